"""What the cache makes is on the model's device: shown without a GPU, on a device that exists in tests alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from releases import TORCH, needs


@needs("5.24", "the device of the tests has the operations that the newest release uses")
@pytest.mark.skipif(TORCH < (2, 10), reason="before torch 2.10, no device can be written in Python")
def test_the_laws_hold_on_another_device() -> None:
    """`device_laws.py`, in a process of its own: a device is registered for good."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "device_laws.py"]
    ran = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
