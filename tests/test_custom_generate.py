"""`custom_generate=<this repository>` keeps the argument names of `SinkCache`, which transformers had before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from calling import generated
from sinkwindow import StreamingCache
from strategies import ModelSpec, tokens

ROOT = Path(__file__).parents[1] / "hub"


def test_the_old_names_give_the_streaming_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`window_length` includes the sinks, so the cache has W = window_length - num_sink_tokens and no buffer."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    model, ids = ModelSpec().model(), tokens(1, 1, 20)
    wanted = generated(model, ids, StreamingCache(model, 3, 6, 0), 15)
    options: dict[str, Any] = {"custom_generate": str(ROOT), "trust_remote_code": True}
    assert generated(model, ids, None, 15, **options, window_length=9, num_sink_tokens=3) == wanted
    assert generated(model, ids, None, 15) != wanted, "the window must change the tokens, or this test checks nothing"


def test_windows_without_room_are_refused() -> None:
    """A window no longer than the sinks, and a second cache, are errors that name the argument."""
    spec = importlib.util.spec_from_file_location("custom", ROOT / "custom_generate" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = ModelSpec().model()
    with pytest.raises(ValueError, match="window_length must exceed num_sink_tokens"):
        module.generate(model, window_length=4, num_sink_tokens=4)
    with pytest.raises(ValueError, match="past_key_values must not be passed"):
        module.generate(model, past_key_values=StreamingCache(model, 1, 4, 0))
