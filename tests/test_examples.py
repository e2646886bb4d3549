"""The examples in the docstrings of what users import do what they print."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

import sinkwindow
from sinkwindow.model.versions import CACHE_ARGUMENT

FINDER = doctest.DocTestFinder(exclude_empty=True)


def _examples(name: str) -> list[doctest.DocTest]:
    """Return the examples of a public object and of its methods, that of the object first."""
    shown = getattr(sinkwindow, name)
    ours = [base for base in getattr(shown, "__mro__", [shown]) if base.__module__.startswith("sinkwindow")]
    found = [test for part in ours for test in FINDER.find(part, name)]
    for test in found:
        for example in test.examples:  # as this release of transformers calls it
            example.source = example.source.replace("cache=cache", f"{CACHE_ARGUMENT}=cache")
    return sorted((test for test in found if test.examples), key=lambda test: len(test.name))


def _run(test: doctest.DocTest, names: dict[str, Any]) -> None:
    test.globs = names
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("name", ["Retention", "StreamingCache", "supports"])
def test_examples_print_what_they_say(name: str) -> None:
    """Those of methods go on from that of the class, each from a fresh one."""
    first, *others = _examples(name)
    _run(first, dict(vars(__import__(getattr(sinkwindow, name).__module__, fromlist=["x"]))))
    for test in others:
        names: dict[str, Any] = {name: getattr(sinkwindow, name) for name in sinkwindow.__all__}
        _run(first, names)
        _run(test, names)


def test_the_methods_that_change_a_cache_have_examples() -> None:
    """A reader of `help(StreamingCache)` can copy one, and sees nothing of the hooks."""
    shown = {test.name.partition(".")[2] for test in _examples("StreamingCache")}
    assert {"", "activate_past_recording", "debug_state", "reset", "snapshot"} <= shown
    hooks = ("begin_call", "begin_step", "commit_call", "commit_step", "first_cut")
    assert not [name for name in hooks if hasattr(sinkwindow.StreamingCache, name)]
