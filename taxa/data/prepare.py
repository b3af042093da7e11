"""Making the demo dataset."""

import subprocess
import sys
from pathlib import Path


def prepare_demo(out):
    """Write the simulated dataset into a new folder, as `prepare.py --demo --out OUT` does."""
    subprocess.run([sys.executable, Path(__file__).parents[2] / "prepare.py", "--demo", "--out", out], check=True)
