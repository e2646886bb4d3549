"""Copy the results of asv from a folder that is not trusted, by name, and nothing else: `take_results.py FROM TO`.

A job with write permission runs this on an artifact, which any code on a self-hosted runner may have written. Every
file is checked before the first is copied. A link, or a file with the name of a result and other content, refuses them
all; files with other names are listed and left.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, Final

MACHINE: Final = r"(?P<machine>\w[\w.-]*)"
RESULT: Final = re.compile(rf"{MACHINE}/(?P<commit>[0-9a-f]{{8,40}})-[\w.-]+\.json", re.ASCII)
DESCRIPTION: Final = re.compile(rf"{MACHINE}/machine\.json", re.ASCII)
BENCHMARKS: Final = "benchmarks.json"
UNMEASURED: Final = "unmeasured.txt"  # commits that cannot be built: asv_benches/history.py shows the reasons as text
REASON: Final = re.compile(r"[0-9a-f]{40}\t[^\t]*")
LARGEST: Final = 8 * 2**20  # of one file [bytes]
MOST: Final = 10_000  # files


class RefusedError(Exception):
    """The folder is not what asv writes; the message names the file."""


def named(name: str) -> bool:
    """Return whether a result of asv has this name; it is relative to the folder, with slashes."""
    return name in {BENCHMARKS, UNMEASURED} or any(one.fullmatch(name) for one in (RESULT, DESCRIPTION))


def files(folder: Path) -> dict[str, os.stat_result]:
    """Return the size and kind of every file below a folder, without following links."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            status = path.lstat()
            relative = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise RefusedError(f"{relative!r} is neither a file nor a folder")
            if stat.S_ISREG(status.st_mode):
                found[relative] = status
    if len(found) > MOST:
        raise RefusedError(f"{len(found)} files, more than {MOST}")
    return found


def check(name: str, text: str) -> None:
    """Refuse a file whose content is not that of a result with its name."""
    if name == UNMEASURED:
        right = all(REASON.fullmatch(line) and line.replace("\t", " ").isprintable() for line in text.splitlines())
    else:
        right = _is_result(name, _parsed(name, text))
    if not right:
        raise RefusedError(f"{name!r} does not have the content of a result with this name")


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{name!r} is not JSON") from error
    if not isinstance(found, dict):
        raise RefusedError(f"{name!r} is not an object")
    return found


def _is_result(name: str, found: dict[str, Any]) -> bool:
    if name == BENCHMARKS:
        return all(key == "version" or (isinstance(one, dict) and one.get("name") == key) for key, one in found.items())
    if "<" in json.dumps({**found, "durations": None}):  # shown on asv's pages; asv itself times a part named "<build>"
        return False
    if match := DESCRIPTION.fullmatch(name):
        return bool(found.get("machine") == match["machine"])
    match = RESULT.fullmatch(name)
    commit, parameters = found.get("commit_hash"), found.get("params")
    return (
        match is not None
        and isinstance(commit, str)
        and re.fullmatch(r"[0-9a-f]{40}", commit) is not None
        and commit.startswith(match["commit"])
        and isinstance(parameters, dict)
        and parameters.get("machine") == match["machine"]
        and isinstance(found.get("results"), dict)
    )


def take(source: Path, target: Path) -> list[str]:
    """Copy the results, after all of them were checked, and return the names of the files that were left."""
    found = files(source)
    taken: dict[str, bytes] = {}
    for name in filter(named, found):
        if found[name].st_size > LARGEST:
            raise RefusedError(f"{name!r} has {found[name].st_size} bytes, more than {LARGEST}")
        taken[name] = (source / name).read_bytes()
        try:
            check(name, taken[name].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RefusedError(f"{name!r} is not UTF-8") from error
        if (target / name).resolve() != target.resolve() / name:
            raise RefusedError(f"{name!r} would be written through a link")
    for name, content in taken.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return sorted(found.keys() - taken.keys())


if __name__ == "__main__":
    try:
        left = take(Path(sys.argv[1]), Path(sys.argv[2]))
    except RefusedError as refused:
        sys.exit(f"nothing is taken: {refused}")
    sys.stdout.writelines(f"left: {name!r}\n" for name in left)
