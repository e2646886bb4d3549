"""Laws that an older transformers or torch cannot keep, each with the release that brings what it needs, and why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sinkwindow.model.versions import since

if sys.version_info >= (3, 11):
    import tomllib as tomllib  # noqa: PLC0414 - for all tests
else:
    import tomli as tomllib  # noqa: F401

if TYPE_CHECKING:
    from sinkwindow import StreamingCache


def needs(release: str, why: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test before a release.

    Nothing is skipped on the newest one: `tests/test_versions.py` holds that. docs/support.md lists what is, and why.
    """
    return pytest.mark.skipif(not since(release), reason=f"needs transformers {release}: {why}")


IN_PARTS = needs("5.21", "before, drafts and chunks of a prompt go wrong behind a filled cache, given new tokens alone")
NEW_ALONE = needs("5.3", "before, generate takes the whole text, not the new tokens alone")
STATIC_DRAFTS = needs("5.5", "before, generate refuses drafts with any cache that can be compiled")
CROP = needs("5.14", "before, crop also takes a number of columns to keep")
# Why `sinkwindow.continuous` cannot be imported; empty where it can; `tests/test_versions.py` checks the newest.
UNPAGED = (
    "" if since("5.24") else "needs transformers 5.24: before, no test compares its paged cache with the reference"
)
NEWEST = needs("5.24", "what is written or built here is that of the newest release")


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
MOST_GRAPHS = 1 if TORCH >= (2, 8) else 2  # for several caches of the same sizes


def traced_error(text: str) -> str:
    """Return what an error says that is raised while a step is traced: before torch 2.9 not its own text."""
    return text if TORCH >= (2, 9) else "Observed exception"


def ready_for_drafts(cache: StreamingCache) -> StreamingCache:
    """Return a cache that records its past, as `generate` itself asks for from transformers 5.14 on."""
    if not since("5.14"):
        cache.activate_past_recording()
    return cache


def as_released(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a configuration by the names that they have in this release."""
    if since("5.0") or "rope_parameters" not in arguments:
        return arguments
    rope = dict(arguments["rope_parameters"])
    theta, part = rope.pop("rope_theta", 10_000.0), rope.pop("partial_rotary_factor", None)
    older = {"rope_theta": theta, "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}
    if rope.get("rope_type") == "longrope":
        older["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        older["rope_scaling"] = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    if part is not None:  # GPT-NeoX
        older |= {"rotary_pct": part, "rotary_emb_base": theta}
    return {name: value for name, value in arguments.items() if name != "rope_parameters"} | older
