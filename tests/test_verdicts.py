"""The page of verdicts is complete and current, and every family that streams is compared with the reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import transformers

from families import FAMILIES
from hybrids import HYBRIDS
from sinkwindow import StreamingCache, UnsupportedModelError, supports
from sinkwindow.model.families import FAMILIES as SUPPORTED
from sinkwindow_reference import reference_logits
from strategies import tokens
from verdicts import MODEL_TYPES, build, verdict

PAGE: Final = (Path(__file__).parents[1] / "docs" / "verdicts.md").read_text(encoding="utf-8")
ROWS: Final = dict(re.findall(r"^\| `(.+?)` \| ((?:streams|refused|cannot be tried) \| .*) \|$", PAGE, re.MULTILINE))
STREAMS: Final = [name for name, row in ROWS.items() if row.startswith("streams") and name in MODEL_TYPES]
TESTED: Final = {family.model_type for family in FAMILIES.values()} | set(HYBRIDS)
# One model type for each reason.
REFUSED: Final = {
    "beam": "scales the queries of its layers without RoPE",
    "blt": "attends to patches of bytes",
    "deepseek_v3": "caches latent keys and values (MLA)",
    "diffllama": "attends twice in each layer",
    "doge": "makes a bias of the cached values",
    "dory": "runs its layers several times",
    "gemma4_unified_assistant": "has no layer with keys of its own",
    "gpt2": "has absolute position embeddings",
    "hrm_text": "lets the tokens of a prompt attend to each other",
    "hunyuan_v1_dense": "scales channels of queries and keys after rotating",
    "llama4_text": "attends within chunks",
    "mamba": "keeps a state of fixed size",
    "minimax_m3_vl_text": "chooses the tokens to attend to by an index",
    "mllama": "attend to something other than its own tokens",
    "opt": "has absolute position embeddings",
    "phi4_multimodal": "takes images or sound in the same call",
    "xlnet": "has a bias by relative position",
}
OF_THE_RELEASE: Final = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE, reason="the page is that of another release"
)


@OF_THE_RELEASE
def test_every_model_type_has_a_verdict() -> None:
    """The page has a row for each model type with a causal language model, and what the table supports streams."""
    assert tuple(ROWS) == MODEL_TYPES
    assert "WRONG" not in PAGE
    assert not [name for name in SUPPORTED if name in ROWS and "known to stream" in ROWS[name]]


@OF_THE_RELEASE
@pytest.mark.parametrize("model_type", [name for name in STREAMS if name not in TESTED])
def test_what_is_not_tested_elsewhere_streams(model_type: str) -> None:
    """A model of its small default configuration equals the reference, and the reference the stock model."""
    found = verdict(model_type)
    assert found.word == "streams", found.detail


@OF_THE_RELEASE
@pytest.mark.parametrize("model_type", REFUSED)
def test_refusals_are_those_of_the_page(model_type: str) -> None:
    """`supports` and the constructor give the reason that the page gives, and the model is left as it was."""
    model = build(model_type)
    before = model.config.to_dict()
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[model_type])) as error:
        StreamingCache(model)
    assert (bool(supports(model)), supports(model).reason) == (False, str(error.value))
    assert str(error.value).removeprefix(f"model_type {model_type!r} ") in ROWS[model_type]
    assert model.config.to_dict() == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["beam", "deepseek_v3", "doge", "gpt2", "hunyuan_v1_moe", "mamba", "opt"])
def test_the_reference_refuses_them_too(model_type: str) -> None:
    """The reference raises an error rather than return wrong logits."""
    if model_type not in MODEL_TYPES:
        pytest.skip("this release does not have it")  # not on the newest, whose types OF_THE_RELEASE compares
    with pytest.raises(ValueError, match=rf"model of type '{model_type}' .*the rule does not fit"):
        reference_logits(build(model_type), tokens(0, 1, 4), num_sinks=1, window=3)
