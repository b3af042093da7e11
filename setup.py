"""taxa as a package: `pip install .`

`pip install -r requirements.lock` installs the exact versions that CI runs.
"""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds: the oldest releases that the suite has run on (docs/VERSIONS.md), or for a newer
# Python the oldest that have a wheel for it.
TEST = [
    "pytest>=8",
    "hypothesis>=6.100",
    "scikit-learn>=1.4; python_version < '3.13'",
    "scikit-learn>=1.5.2; python_version == '3.13'",
    "scikit-learn>=1.7.2; python_version >= '3.14'",
    "peft>=0.17",
    "pytest-xdist>=3.5",
    "ruff>=0.12",
]
REPORT = [
    "matplotlib>=3.8; python_version < '3.13'",
    "matplotlib>=3.9.2; python_version == '3.13'",
    "matplotlib>=3.10.5; python_version >= '3.14'",
]

setup(
    name="taxa",
    version="1.0.0",
    description=(
        "Fine-tune genomic language models to classify DNA fragments by superkingdom, phylum and "
        "genus"
    ),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["taxa", "taxa.*"]),
    package_data={"taxa": ["assets/*.json", "assets/*.csv", "assets/tiny_nt/*"]},
    install_requires=[
        "torch>=2.10",
        "transformers>=4.50,<6",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "huggingface_hub>=0.26",
        "numpy>=1.26; python_version < '3.13'",
        "numpy>=2.1; python_version == '3.13'",
        "numpy>=2.3.2; python_version >= '3.14'",
        "pyfaidx>=0.8",
        "ete3>=3.1.3,<4",
        # ete3 needs six and does not say so, and it imports cgi, which Python 3.13 dropped
        "six>=1.16",
        "legacy-cgi>=2.6; python_version >= '3.13'",
        "tqdm>=4.60",
    ],
    extras_require={"test": TEST, "bench": TEST, "report": REPORT},
)
