"""A model of a type that nobody has tried is accepted after a check of a tiny copy, or refused with its error."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import families
from image_text import build as build_image_text
from lab_tiny import random_text, run, save_tiny
from sinkwindow import Family, StreamingCache, UnsupportedModelError, supports
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.tiny import tiny_config
from sinkwindow_lab.measure.untested import check_untested
from strategies import CACHE_NAME, Rule, stream, tokens, worst

if TYPE_CHECKING:
    from pathlib import Path

RULE = Rule(2, 5, 2)
SIZES: Any = {**families.GQA, "bos_token_id": None, "eos_token_id": None}


class OddDecoder(LlamaModel):  # type: ignore[no-untyped-call]  # transformers registers subclasses
    """Rotates by the squares of positions: no difference of positions tells how."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        """Run the decoder at other positions."""
        if position_ids is None:
            position_ids = torch.arange(kwargs["input_ids"].shape[1])[None]
        return super().forward(*args, position_ids=position_ids * position_ids, **kwargs)


class LeakyDecoder(LlamaModel):  # type: ignore[no-untyped-call]
    """Adds to its embeddings how much the cache holds, which no comparison without a cache would show."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on other embeddings."""
        cache = kwargs.get(CACHE_NAME)
        if cache is not None:
            kwargs["inputs_embeds"] = self.embed_tokens(kwargs.pop("input_ids")) + 1e-3 * cache.get_seq_length()
        return super().forward(*args, **kwargs)


def named(model_type: str, config: type, base: Any, decoder: Any = None) -> Any:
    """Return a class of models like another one, of a type that nobody has tried, and maybe with another decoder."""

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        if decoder is not None:
            self.model = decoder(config)

    own = type("OwnConfig", (config,), {"model_type": model_type})
    return type("Own", (base,), {"config_class": own, "__init__": init})


Right = named("right", LlamaConfig, LlamaForCausalLM)
Mixed = named("mixed", Cohere2Config, Cohere2ForCausalLM)  # layers without a window do not rotate
Odd = named("odd", LlamaConfig, LlamaForCausalLM, OddDecoder)
Leaky = named("leaky", LlamaConfig, LlamaForCausalLM, LeakyDecoder)


def make(kind: Any, **sizes: Any) -> Any:
    """Return a random model in float64."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 1.0}
UNTRIED = [(Right, {}, Family()), (Mixed, WINDOWS, Family(only_sliding_rotate=True))]


@pytest.mark.parametrize(("kind", "sizes", "family"), UNTRIED, ids=["right", "mixed"])
def test_a_right_model_is_accepted_as_what_it_is(kind: Any, sizes: dict[str, Any], family: Family) -> None:
    """The check finds what cannot be read off it; under that the cache accepts it, and gives its bits."""
    model, ids = make(kind, **sizes), tokens(0, 1, 40)
    known = make(kind.__bases__[0], **sizes)
    assert "sinkwindow verify --untested" in supports(model).reason
    assert check_untested(model) == family
    assert supports(model, family)
    logits = stream(model, RULE.cache(model, family=family), ids, [20, 1, 19])
    assert worst(logits - stream(known, RULE.cache(known), ids, [20, 1, 19])) == 0


def test_only_the_family_that_fits_passes() -> None:
    """With another one the cache would be wrong: that is what the check compares."""
    model, known, ids = make(Mixed, **WINDOWS), make(Cohere2ForCausalLM, **WINDOWS), tokens(0, 1, 40)
    logits = stream(model, RULE.cache(model, family=Family()), ids, [20, 1, 19])
    assert worst(logits - stream(known, RULE.cache(known), ids, [20, 1, 19])) > 1e-3


def test_positions_of_its_own_are_found_without_a_cache() -> None:
    """The error is that of the reference with everything kept."""
    with pytest.raises(UnsupportedModelError, match=r"'odd' does not stream exactly: .*with everything kept") as caught:
        check_untested(make(Odd))
    error, size = map(float, re.findall(r"error is (\S+) of a logit of up to (\S+),", str(caught.value))[0])
    assert 1e-2 < error < 2 * size


def test_what_only_a_cache_shows_is_found_in_its_call() -> None:
    """The message names the call, the split and the rule."""
    message = r"error is \S+ of a logit .* in call [2-7] of \[\d+, 1, 1, 1, .*\] tokens with {'num_sinks': \d, 'window'"
    with pytest.raises(UnsupportedModelError, match=message):
        check_untested(make(Leaky))


def build(model_type: str, **sizes: Any) -> Any:
    """Return a model of a family."""
    config = AutoConfig.for_model(model_type, **sizes)
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return loader.from_config(config)


@pytest.mark.parametrize("name", ["gpt2", "t5", "deepseek_v2", "mamba"])
def test_no_family_makes_up_for_a_known_reason(name: str) -> None:
    """A reason that is read off the model holds, whatever the caller gives; the check gives the same one."""
    model = build(name, hidden_size=96, num_hidden_layers=1, vocab_size=50, n_routed_experts=4)
    reason = supports(model).reason
    assert supports(model, Family()).reason == reason
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        check_untested(model)


KNOWN = ["llama_yarn", "phi3_longrope", "gpt_neox", "gpt_oss", "mpt", "falcon", "smollm3", "gemma3n_text"]


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_pass(name: str) -> None:
    """Whatever their positions: the check finds what the table has."""
    model = families.build(name)
    assert check_untested(model).counts_columns == (name == "mpt")


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "gemma3"])
def test_of_an_image_text_model_the_text_model_is_checked(name: str) -> None:
    """It has no head of its own."""
    assert check_untested(build_image_text(name)) == Family()


def test_a_large_configuration_becomes_a_tiny_one() -> None:
    """Heads keep their size, layers their order until each kind has come; the model's own configuration stays."""
    model = build("gemma3_text", **families.HEAD_DIM | {"num_hidden_layers": 30, "num_attention_heads": 16})
    config, before = model.config, copy.deepcopy(model.config.to_dict())
    small: Any = tiny_config(config)
    assert config.to_dict() == before
    assert (small.num_hidden_layers, small.layer_types) == (6, config.layer_types[:6])
    assert (small.head_dim, small.hidden_size) == (config.head_dim, small.num_attention_heads * config.head_dim)
    assert check_untested(model) == Family()


def test_a_configuration_that_cannot_be_made_small_says_so() -> None:
    """The caller can bring one."""
    model = make(Right)
    model.config.hidden_act = "unknown"
    with pytest.raises(LabError, match=r"no tiny copy .* OwnConfig \(.*unknown.*\): .* config=\.\.\."):
        check_untested(model)
    assert check_untested(model, Right.config_class(**SIZES)) == Family()


def test_copies_and_files_of_a_cache_keep_the_family(tmp_path: Path) -> None:
    """A copy goes on, and so does what was saved: nothing has to be given again. Other families are other settings."""
    model, ids = make(Mixed, **WINDOWS), tokens(1, 1, 40)
    family = Family(only_sliding_rotate=True)
    cache = RULE.cache(model, family=family)
    stream(model, cache, ids[:, :20], [20])
    cache.save(tmp_path / "cache.safetensors")
    loaded, twin = StreamingCache.load(tmp_path / "cache.safetensors", model), copy.deepcopy(cache)
    with pytest.raises(ValueError, match="family"):
        RULE.cache(model, family=Family()).restore(cache.snapshot())
    expected = stream(model, cache, ids[:, 20:], [1, 19])
    for one in (loaded, twin):
        assert torch.equal(stream(model, one, ids[:, 20:], [1, 19]), expected)


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a text and a tiny model of a type that the table does not have."""
    save_tiny(tmp_path)
    (tmp_path / "text.txt").write_text(random_text(100), encoding="utf-8")
    monkeypatch.delitem(__import__("sinkwindow.model.families", fromlist=["FAMILIES"]).FAMILIES, "llama")
    return tmp_path


def test_verify_and_chat_take_an_untested_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the option they refuse it, with status 2, and name the option."""
    model = ("--model", folder)
    verify = ("verify", *model, "--corpus", folder / "text.txt", "--sinks", 2, "--window", 6, "--buffer", 1)
    status, _, words = run(capsys, *verify, "--tokens", "40")
    assert (status, "sinkwindow verify --untested" in words) == (2, True)
    status, found, words = run(capsys, *verify, "--tokens", "40", "--untested")
    assert (status, found.splitlines()[-1]) == (0, "verdict: RIGHT")
    assert "streams exactly: StreamingCache(model, family=Family(" in words
    assert run(capsys, "chat", *model, "--untested", "--load", "x")[0] == 2
