"""taxa as a package: `pip install .`, or `pip install -r requirements.lock` for the exact versions that CI runs."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "hypothesis>=6.100", "scikit-learn>=1.4", "peft>=0.17", "pytest-xdist>=3.5"]

setup(
    name="taxa",
    version="0.1.0",
    description="Fine-tune genomic language models to name the superkingdom, phylum and genus of a piece of DNA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["taxa", "taxa.*"]),
    package_data={"taxa": ["assets/*.json", "assets/*.csv", "assets/tiny_nt/*"]},
    install_requires=[
        "torch>=2.8",
        "transformers>=4.50,<6",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "huggingface_hub>=0.26",
        "numpy>=1.26",
        "pyfaidx>=0.8",
        "ete3>=3.1.3,<4",
        "six>=1.16",  # ete3 needs it and does not say so
        "legacy-cgi>=2.6; python_version >= '3.13'",  # ete3 imports cgi, which Python 3.13 dropped
        "tqdm>=4.60",
    ],
    extras_require={"test": TEST, "bench": TEST, "report": ["matplotlib>=3.8"]},
)
