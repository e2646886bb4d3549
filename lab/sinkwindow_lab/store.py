"""Finished measurements, stored by what they depend on, so that an interrupted run continues where it stopped.

A key contains everything that a number depends on: configuration, model, tokens, dtype, device, and the source text of
the modules that measure. Whatever changes, the key changes, and the number is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

import sinkwindow
from sinkwindow_lab import files
from sinkwindow_lab.records import Measurement

PACKAGES = ("torch", "transformers")
NAME_LENGTH = 24  # hexadecimal digits of the key's digest in a file name
T = TypeVar("T")
MEASUREMENTS = TypeAdapter(list[Measurement])


class Store:
    """A folder of measurements, one file each, written atomically."""

    def __init__(self, folder: Path | None = None, *, fresh: bool = False) -> None:
        """Open the folder; `fresh` measures everything again, once, and replaces the files."""
        self.folder = None if folder is None else files.output_folder(folder)
        self._fresh = fresh
        self._written: set[Path] = set()
        self._found: set[Path] = set()
        self._adopted: set[Path] = set()

    @property
    def reused(self) -> int:
        """How many measurements are from an earlier run, not from this one or other processes of it."""
        return len(self._found - self._written - self._adopted)

    @property
    def written(self) -> list[str]:
        """The names of the files that this run has written."""
        return sorted(path.name for path in self._written)

    def adopt(self, names: Iterable[str]) -> None:
        """Take files as measured by this run, which other processes of it have written."""
        self._adopted.update((self.folder or Path()) / name for name in names)

    @property
    def again(self) -> str:
        """How to go on after an interruption, in words."""
        return f"the same command{' without --fresh' if self._fresh else ''} continues"

    def __str__(self) -> str:
        kept = [*(self.folder or Path()).glob(f"*-{'[0-9a-f]' * NAME_LENGTH}.json")]  # also of other processes
        return f"{len(kept)} finished measurements are kept in {self.folder}; {self.again} from there"

    def measurements(
        self, what: str, key: Mapping[str, Any], measure: Callable[[], list[Measurement]]
    ) -> list[Measurement]:
        """Return measurements from their file, named by `what` and `key` (JSON values), or measured now and stored."""
        found = self.read(what, key, MEASUREMENTS)
        if found is not None:
            return found
        made = measure()
        self.write(what, key, MEASUREMENTS.dump_python(made))
        return made

    def read(self, what: str, key: Mapping[str, Any], kind: TypeAdapter[T]) -> T | None:
        """Return what is stored; None if it is to be measured: also what is of another version, or broken by hand."""
        path = self._path(what, key)
        if self.folder is not None and path.is_file() and (not self._fresh or path in self._written | self._adopted):
            with suppress(KeyError, TypeError, ValueError):
                found = kind.validate_python(json.loads(path.read_text(encoding="utf-8"))["value"])
                self._found.add(path)
                return found
        return None

    def write(self, what: str, key: Mapping[str, Any], value: Any) -> None:
        """Store a JSON value."""
        if self.folder is not None:
            content = json.dumps({"what": what, "key": dict(key), "value": value})
            self._written.add(files.write_text(self._path(what, key), f"{content}\n"))

    def _path(self, what: str, key: Mapping[str, Any]) -> Path:
        if self.folder is not None and not {"code", "model"} <= key.keys():
            raise ValueError(f"key {sorted(key)} of {what!r} needs code and model: numbers depend on both")
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return (self.folder or Path()) / f"{what}-{digest[:NAME_LENGTH]}.json"


@functools.cache
def code_version(*modules: str) -> str:
    """Return a digest of the code of a number: the cache, `PACKAGES`, and lab modules such as `measure.perplexity`."""
    lab, core = Path(__file__).parent, Path(sinkwindow.__file__).parent
    sources = sorted(core.rglob("*.py")) + [lab / f"{name.replace('.', '/')}.py" for name in modules]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()
