"""Prints what setup.py asks for, tests and figures included, as a requirements file: `oldest` pins
every lower bound, `newest` pins nothing.
"""

import re
import sys
from distutils.core import run_setup

import setuptools  # noqa: F401  (brings distutils to Python 3.12 and later)


def requirements(which):
    """The lines of a requirements file.

    Raises ValueError for a requirement without a lower bound: nobody could say what was tested.
    """
    # An old setuptools hides extras with markers: make upgrades it.
    package = run_setup("setup.py", stop_after="init")
    extras = package.extras_require
    asked = sorted({*package.install_requires, *extras["test"], *extras["report"]})
    return asked if which == "newest" else [pinned(requirement) for requirement in asked]


def pinned(requirement):
    """"name<4,>=3.1; marker" -> "name==3.1; marker"."""
    bounds, _, marker = requirement.partition(";")
    found = re.fullmatch(r"([\w-]+)[^>]*>=([\d.]+)[^>]*", bounds.strip())
    if not found:
        raise ValueError(f"setup.py: '{requirement}' has no lower bound")
    return f"{found[1]}=={found[2]}" + (f" ;{marker}" if marker else "")


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
