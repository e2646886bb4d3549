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
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import sinkwindow
from sinkwindow_lab import files
from sinkwindow_lab.measure.perplexity import Perplexity
from sinkwindow_lab.records import PerplexityRecord, Record

Kind = TypeVar("Kind", bound=Record)
PACKAGES = ("torch", "transformers")
NAME_LENGTH = 24  # hexadecimal digits of the key's digest in a file name


class Store:
    """A folder of measurements, one file each, written atomically."""

    def __init__(self, folder: Path | None = None, *, fresh: bool = False) -> None:
        """Open the folder; None stores nothing.

        `fresh` measures everything again, once, and replaces the stored files.
        """
        self._folder = None if folder is None else files.output_folder(folder)
        self._fresh = fresh
        self._written: set[Path] = set()
        self.reused = 0

    def record(self, what: str, key: Mapping[str, Any], kind: type[Kind], measure: Callable[[], Kind]) -> Kind:
        """Return a record of class `kind`, from its file or measured now.

        `what` is the start of the file's name; `key` is all that the record depends on, as JSON values.
        """
        path = self._path(what, key, "json")
        if path is not None and self._usable(path):
            try:
                found = kind.model_validate(json.loads(path.read_text(encoding="utf-8"))["value"])
            except (KeyError, TypeError, ValueError):  # of another version, or broken by hand: measure again
                pass
            else:
                self.reused += 1
                return found
        made = measure()
        if path is not None:
            content = {"what": what, "key": dict(key), "value": made.model_dump()}
            self._write(path, (json.dumps(content, indent=1) + "\n").encode())
        return made

    def losses(self, what: str, key: Mapping[str, Any], measure: Callable[[], Perplexity]) -> Perplexity:
        """Return a perplexity with every token's loss, from its file or measured now; arguments as in `record`."""
        path = self._path(what, key, "safetensors")
        if path is not None and self._usable(path):
            try:
                with safe_open(path, framework="pt") as file:
                    record = PerplexityRecord.model_validate_json((file.metadata() or {})["record"])
                    found = Perplexity(record, file.get_tensor("nll"))
            except (KeyError, SafetensorError, ValidationError):
                pass
            else:
                self.reused += 1
                return found
        made = measure()
        if path is not None:
            head = {"what": what, "key": json.dumps(dict(key)), "record": made.record.model_dump_json()}
            self._write(path, save({"nll": made.nll}, metadata=head))
        return made

    def _path(self, what: str, key: Mapping[str, Any], suffix: str) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps(key, sort_keys=True, ensure_ascii=True)
        return self._folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:NAME_LENGTH]}.{suffix}"

    def _usable(self, path: Path) -> bool:
        return path.is_file() and (not self._fresh or path in self._written)

    def _write(self, path: Path, content: bytes) -> None:
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
