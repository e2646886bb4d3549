"""Finished measurements, stored by what they depend on, so that an interrupted run continues where it stopped.

A key contains everything that a number depends on: configuration, model, tokens, dtype, device, and the source text of
the modules that measure. Whatever changes, the key changes, and the number is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import sinkwindow
from sinkwindow_lab import files
from sinkwindow_lab.records import Measurement

PACKAGES = ("torch", "transformers")
NAME_LENGTH = 24  # hexadecimal digits of the key's digest in a file name
MEASUREMENTS = TypeAdapter(list[Measurement])


class Store:
    """A folder of measurements, one file each, written atomically.

    Attributes:
        reused: How many were found instead of measured.
    """

    def __init__(self, folder: Path | None = None, *, fresh: bool = False) -> None:
        """Open the folder; None stores nothing, `fresh` measures everything again, once, and replaces the files."""
        self._folder = None if folder is None else files.output_folder(folder)
        self._fresh = fresh
        self._written: set[Path] = set()
        self.reused = 0

    def measurements(
        self, what: str, key: Mapping[str, Any], measure: Callable[[], list[Measurement]]
    ) -> list[Measurement]:
        """Return measurements from their file, or measured now and stored.

        `what` is the start of the file's name; `key` is all that they depend on, as JSON values.
        """
        path = self._path(what, key, "json")
        if self._usable(path):
            try:
                found = MEASUREMENTS.validate_python(json.loads(path.read_text(encoding="utf-8"))["value"])
            except (KeyError, TypeError, ValueError):  # of another version, or broken by hand: measure again
                pass
            else:
                self.reused += 1
                return found
        made = measure()
        content = {"what": what, "key": dict(key), "value": MEASUREMENTS.dump_python(made)}
        self._write(path, (json.dumps(content, indent=1) + "\n").encode())
        return made

    def losses(self, what: str, key: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]] | None:
        """Return the losses of a reading and its facts if they are stored."""
        path = self._path(what, key, "safetensors")
        if not self._usable(path):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = file.get_tensor("nll"), dict(json.loads(file.metadata()["facts"]))
        except (KeyError, TypeError, ValueError, SafetensorError):
            return None
        return found

    def keep_losses(self, what: str, key: Mapping[str, Any], nll: torch.Tensor, facts: Mapping[str, float]) -> None:
        """Store the losses of a reading [targets] and its facts."""
        head = {"what": what, "key": json.dumps(dict(key)), "facts": json.dumps(dict(facts))}
        self._write(self._path(what, key, "safetensors"), save({"nll": nll.contiguous()}, metadata=head))

    def _path(self, what: str, key: Mapping[str, Any], suffix: str) -> Path:
        text = json.dumps(key, sort_keys=True, ensure_ascii=True)
        name = f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:NAME_LENGTH]}.{suffix}"
        return (self._folder or Path()) / name

    def _usable(self, path: Path) -> bool:
        return self._folder is not None and path.is_file() and (not self._fresh or path in self._written)

    def _write(self, path: Path, content: bytes) -> None:
        if self._folder is not None:
            files.write_bytes(path, content)
            self._written.add(path)


@functools.cache
def code_version(*modules: str) -> str:
    """Return a digest of the source text that a number depends on: the cache itself and the named lab modules.

    Modules are named below `sinkwindow_lab`, such as `measure.perplexity`. The versions of torch and transformers are
    included.
    """
    lab, core = Path(__file__).parent, Path(sinkwindow.__file__).parent
    sources = sorted(core.rglob("*.py")) + [lab / f"{name.replace('.', '/')}.py" for name in modules]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()
