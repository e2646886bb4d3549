"""`custom_generate=<this repository>` keeps the argument names of `SinkCache`, which transformers had before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinkwindow import StreamingCache
from sinkwindow.model.versions import CACHE_ARGUMENT

ROOT = Path(__file__).parents[1] / "hub"
CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model whose attention is far from uniform."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


def test_the_old_names_give_the_streaming_tokens(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`window_length` includes the sinks, so the cache has W = window_length - num_sink_tokens and no buffer."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    ids = torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(1))
    cache: dict[str, Any] = {CACHE_ARGUMENT: StreamingCache(model, 3, 6, 0)}
    wanted = model.generate(ids, **cache, max_new_tokens=15, do_sample=False)
    options: dict[str, Any] = {"custom_generate": str(ROOT), "trust_remote_code": True}
    got = model.generate(ids, **options, window_length=9, num_sink_tokens=3, max_new_tokens=15, do_sample=False)
    assert got.tolist() == wanted.tolist()
    dense = model.generate(ids, max_new_tokens=15, do_sample=False)
    assert dense.tolist() != wanted.tolist(), "the window must change the tokens, or this test checks nothing"


def test_windows_without_room_are_refused(model: Any) -> None:
    """A window no longer than the sinks, and a second cache, are errors that name the argument."""
    spec = importlib.util.spec_from_file_location("custom", ROOT / "custom_generate" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="window_length must exceed num_sink_tokens"):
        module.generate(model, window_length=4, num_sink_tokens=4)
    with pytest.raises(ValueError, match="past_key_values must not be passed"):
        module.generate(model, past_key_values=StreamingCache(model, 1, 4, 0))
