"""A cache of an image-text model streams its text model: exactly, or it refuses before anything changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from image_text import AHEAD, IMAGE, KINDS, RECIPES, REFUSED, WORDS, build, heard
from releases import needs
from sinkwindow import StreamingCache, UnsupportedModelError, supports
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    Rule,
    budget,
    observe,
    padding_mask,
    rules,
    seeds,
    splits,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

pytestmark = needs("5.24", "before, image-text models are refused by name")
RULE = Rule(2, 5, 2)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
names = pytest.mark.parametrize("name", RECIPES)


def words(seed: int, batch: int, columns: int) -> Tensor:
    """Return random words, `[batch, columns]`."""
    return torch.randint(0, WORDS, (batch, columns), generator=torch.Generator().manual_seed(seed))


def model_of(name: str) -> Any:
    """Return a model that remembers no earlier call."""
    model: Any = build(name)
    if name in QWEN:
        model.model.rope_deltas = None
    return model


def decoder_of(model: Any) -> PreTrainedModel:
    """Return the text model."""
    decoder: PreTrainedModel = model.get_decoder()
    return decoder


@torch.no_grad()
def feed(model: Any, cache: StreamingCache, ids: Tensor, lengths: list[int], mask: Tensor) -> None:
    """Feed a text call by call."""
    end = 0
    for length in lengths:
        start, end = end, end + length
        model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], **{CACHE_NAME: cache})


# -- texts ----------------------------------------------------------------------------------------------------------


@names
@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=60), holes=st.booleans())
@budget(0.05)
def test_texts_stream_as_the_reference_says(
    name: str, rule: Rule, seed: int, lengths: list[int], *, holes: bool
) -> None:
    """In both modes, with padding in any call, whatever the mask and positions that the model makes of them."""
    model, ids = model_of(name), words(seed, 2, sum(lengths))
    mask = padding_mask(seed, 2, lengths, holes=holes)
    with heard(decoder_of(model)) as ear:
        feed(model, rule.cache(model), ids, lengths, mask)
    expected = ear.expected(mask, chunks=lengths, **rule.arguments)
    assert worst((ear.states - expected)[mask.bool()]) < EXACT


@names
@pytest.mark.parametrize("variant", ["dynamic", "static", "of the text model"])
def test_generate_goes_on_past_evictions(name: str, variant: str) -> None:
    """A padded batch, through the model's own preparation of inputs; a second turn goes on where the first ended."""
    model, ids, mask = model_of(name), words(1, 2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    target = decoder_of(model) if variant == "of the text model" else model
    cache = RULE.cache(target, static=variant == "static")
    with heard(decoder_of(model)) as ear:
        for _ in range(2):
            arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, CACHE_NAME: cache}
            ids = torch.cat([model.generate(input_ids=ids, **arguments), words(2, 2, 4)], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, 16)], dim=1)
    fed = mask[:, : ear.states.shape[1]]
    assert cache.num_evictions > 15
    assert worst((ear.states - ear.expected(fed, **RULE.arguments))[fed.bool()]) < EXACT


def test_a_call_that_fails_after_the_text_model_does_not_count() -> None:
    """The call is that of the model which the cache was made for, its head included."""
    model = copy.deepcopy(build("llava_llama"))
    cache, ids = RULE.cache(model), words(0, 1, 20)
    feed(model, cache, ids, [12], torch.ones_like(ids))
    before = observe(cache)
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, ids[:, 12:], [8], torch.ones(1, 20))
    assert observe(cache) == before


# -- images -----------------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("how", ["by hand", "generate"])
def test_a_prompt_with_an_image_streams_exactly_or_is_refused(name: str, how: str) -> None:
    """The prompt evicts a part of its image, and what follows the rest of it; a refusal changes nothing.

    By hand another image comes later.
    """
    model, ids, recipe = model_of(name), words(4, 1, 40), RECIPES[name]
    prompt, cache = recipe.prompt(ids[:, :12]), RULE.cache(model)
    before = observe(cache)

    def act() -> None:
        if how == "generate":
            model.generate(**prompt, max_new_tokens=28, do_sample=False, **{CACHE_NAME: cache})
            return
        with torch.no_grad():
            for part in torch.split(ids, [12, 1, 20, 7], dim=1):
                given = recipe.prompt(part) if part.shape[1] >= 12 else {"input_ids": part}
                model(**given, **{CACHE_NAME: cache})

    if recipe.refused:
        with pytest.raises(ValueError, match=recipe.refused):
            act()
        assert observe(cache) == before
        return
    with heard(decoder_of(model)) as ear:
        act()
    assert cache.num_evictions > 5
    assert worst(ear.states - ear.expected(**RULE.arguments)) < EXACT
    assert (prompt["input_ids"] == IMAGE).sum() == recipe.tokens


@pytest.mark.parametrize("name", QWEN)
def test_a_text_goes_on_after_an_image_was_refused(name: str) -> None:
    """What the model remembers of the image shifts positions of a later call: that is refused, with the way out."""
    model, ids, cache = model_of(name), words(5, 1, 30), RULE.cache(model_of(name))
    with heard(decoder_of(model)) as ear:
        feed(model, cache, ids, [12], torch.ones_like(ids))
    with pytest.raises(ValueError, match=KINDS), torch.no_grad():
        model(**RECIPES[name].prompt(ids[:, :12]), **{CACHE_NAME: RULE.cache(model)})
    with pytest.raises(ValueError, match="set its rope_deltas to None"):
        feed(model, cache, ids[:, 12:], [18], torch.ones(1, 30))
    model.model.rope_deltas = None
    with heard(decoder_of(model)) as rest:
        feed(model, cache, ids[:, 12:], [18], torch.ones(1, 30))
    expected = _both(ear, rest).expected(**RULE.arguments)
    assert worst(torch.cat([ear.states, rest.states], dim=1) - expected) < EXACT


def _both(first: Any, second: Any) -> Any:
    first._embeddings += second._embeddings
    return first


def test_positions_by_time_height_and_width_are_compared_by_token() -> None:
    """Padding may have any; tokens may not have a number that differs, nor a shape without these components."""
    model, ids = model_of("qwen2_vl"), words(6, 2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).repeat(4, 1, 1)
    positions[2, 0, :3] = 7

    def call(given: Tensor) -> StreamingCache:
        cache = RULE.cache(model)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=given, **{CACHE_NAME: cache})
        return cache

    assert call(positions).seen_tokens == call(positions[1:]).seen_tokens == [9, 12]
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(2, 12\), got \(2, 2, 12\)"):
        call(positions[:2])
    with pytest.raises(ValueError, match="but its next token is number 0"):
        call(positions + 1)
    positions[2, 1, 5] += 1
    with pytest.raises(ValueError, match=KINDS):
        call(positions)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # from transformers
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # from torch, same cause
def test_a_mask_that_cannot_be_read_is_refused() -> None:
    """flex_attention has masks of its own kind."""
    model = copy.deepcopy(build("gemma3"))
    model.set_attn_implementation("flex_attention")
    cache, ids = RULE.cache(model), words(7, 1, 8)
    with pytest.raises(ValueError, match=r'BlockMask\. .* use attn_implementation="sdpa" or "eager"'):
        feed(model, cache, ids, [8], torch.ones_like(ids))
    assert cache.seen_tokens == [0]


def test_a_mask_for_each_kind_of_layers_may_be_additive() -> None:
    """The eager attention's masks are numbers, 0 for what is seen; its softmax is in float32."""
    model = copy.deepcopy(build("gemma3"))
    model.set_attn_implementation("eager")
    lengths, ids = [10, 1, 12, 9], words(8, 2, 32)
    mask = padding_mask(3, 2, lengths, holes=True)
    with heard(decoder_of(model)) as ear:
        feed(model, RULE.cache(model), ids, lengths, mask)
    assert worst((ear.states - ear.expected(mask, **RULE.arguments))[mask.bool()]) < 1e-4


def test_the_guide_has_every_model() -> None:
    """Its table says of each one tried what the tests above show."""
    page = (Path(__file__).parents[1] / "docs" / "guides" / "models.md").read_text("utf-8")
    found = [line for line in page.splitlines() if line.startswith("| `")]
    why = {"": "exact", AHEAD: "refused: tokens of an image attend to later ones"}
    why[KINDS] = "refused: positions by time, height and width"
    rows = [(recipe, "exact", why[recipe.refused]) for recipe in RECIPES.values()]
    rows += [(recipe, "refused: ", "refused") for recipe in REFUSED.values()]
    assert len(found) == len(rows)
    for line, (recipe, text, image) in zip(found, rows, strict=True):
        inner = AutoConfig.for_model(recipe.model_type, **recipe.config).text_config.model_type
        assert line.startswith((f"| `{recipe.model_type}` | `{inner}` | {text}", f"| `{recipe.model_type}`, "))
        assert line.endswith(f"| {image} |")


# -- which models are accepted -----------------------------------------------------------------------------------------


@names
def test_the_model_and_its_text_model_are_supported(name: str) -> None:
    """Both are accepted, and the text model is what the cache serves."""
    model = build(name)
    assert (supports(model).reason, supports(decoder_of(model)).reason) == ("", "")
    assert RULE.cache(model)._decoder() is decoder_of(model)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_the_name_of_their_text_model(name: str) -> None:
    """The reason is that of the text model, and the constructor raises it."""
    model = build(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name].refused) as caught:
        StreamingCache(model)
    assert decoder_of(model).config.model_type in str(caught.value)
    assert supports(model).reason == str(caught.value)


class _Tuned(torch.nn.Module):
    """What PEFT puts around a model: two modules, and the configuration of the method."""

    def __init__(self, model: PreTrainedModel, *, is_prompt_learning: bool) -> None:
        super().__init__()
        self.base_model: Any = torch.nn.Module()
        self.base_model.model = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": is_prompt_learning})

    def forward(self, **arguments: Any) -> Any:
        return self.base_model.model(**arguments)


def test_a_module_around_names_the_outermost_model_to_pass() -> None:
    """That of an image-text model is not its text model; calls of the module around it stream."""
    model = build("llava_llama")
    tuned = _Tuned(model, is_prompt_learning=False)
    with pytest.raises(UnsupportedModelError, match=r"wraps a Llava\w+: pass model\.base_model\.model, and call"):
        StreamingCache(tuned)
    ids = words(9, 1, 30)
    with heard(decoder_of(model)) as ear:
        feed(tuned, RULE.cache(model), ids, [12, 1, 17], torch.ones_like(ids))
    assert worst(ear.states - ear.expected(**RULE.arguments)) < EXACT


def test_prompt_learning_is_refused() -> None:
    """Its virtual tokens come with every call."""
    answer = supports(_Tuned(build("llava_llama"), is_prompt_learning=True))
    assert "virtual tokens in front of every call" in answer.reason
    assert "pass model" not in answer.reason


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llava_llama"])
def test_cached_tokens_cannot_be_hidden_by_a_wrapper_s_mask(name: str) -> None:
    """Whether it hands on the mask that it was given, or has made 4D ones of it."""
    model, ids = build(name), torch.randint(1, 40, (1, 15), generator=torch.Generator().manual_seed(0))
    cache, mask = StreamingCache(model, 2, 8, 0), torch.ones(1, 15, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids[:, :10], cache=cache)
        mask[0, 3] = 0
        with pytest.raises(ValueError, match="cannot be hidden afterwards"):
            model(input_ids=ids[:, 10:], attention_mask=mask, cache=cache)
    assert cache.seen_tokens == [10]
