"""The machine of a measurement: the head of every result."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from sinkwindow_lab.errors import require
from sinkwindow_lab.records import MachineRecord

PACKAGES = ("sinkwindow", "torch", "transformers", "tokenizers", "datasets", "gguf")


def describe(device: torch.device) -> MachineRecord:
    """Describe this machine, its software and the state of the working tree."""
    commit = _git("rev-parse", "HEAD")  # None in an installed wheel, or without git
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return MachineRecord(
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=_cores(),
        memory_gb=require("psutil").virtual_memory().total / 1e9,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=platform.platform(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        packages=_versions(),
        commit=commit,
        dirty=None if commit is None or changes is None else bool(changes),
    )


def fingerprint(device: torch.device) -> str:
    """Return what a measured time depends on besides the code, in one line: processor and number of threads."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{_cpu()}, {_cores()} cores, {torch.get_num_threads()} threads, {place}"


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """Return the CPU's name; Linux provides a better one than `platform`."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout that contains this file."""
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no checkout
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None
