"""Runs a script of kernel checks in Triton's interpreter: in a process of its own, since the environment chooses it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def interpret(script: str, *options: str) -> None:
    """The script, a file beside this one, must end with "all equal"."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("triton 3.6's interpreter takes arrays of one element for numbers, which numpy 2.4 refuses")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all equal")
