"""Laws that an older transformers cannot keep, each with the release that brings what it needs, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sinkwindow.model.versions import since

if TYPE_CHECKING:
    from sinkwindow import StreamingCache


def needs(release: str, why: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test before a release."""
    return pytest.mark.skipif(not since(release), reason=f"needs transformers {release}: {why}")


IN_PARTS = needs("5.17", "before, drafts and chunks of a prompt go wrong behind a filled cache, given new tokens alone")
NEW_ALONE = needs("5.3", "before, generate takes the whole text, not the new tokens alone")
CROP = needs("5.14", "before, crop also takes a number of columns to keep")
NEWEST = needs("5.24", "the page is that of the newest release")


def ready_for_drafts(cache: StreamingCache) -> StreamingCache:
    """Return a cache that records its past, as `generate` itself asks for from transformers 5.14 on."""
    if not since("5.14"):
        cache.activate_past_recording()
    return cache
