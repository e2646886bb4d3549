"""What the property tests draw: small integers and a random seed, from which they make models and tokens.

Weights have a standard deviation of 0.35: with the usual 0.02 attention is almost uniform, and a key at a wrong
position hardly changes the logits. Weights are rounded to bfloat16, so that a model has the same weights in every
dtype.
"""

from __future__ import annotations

import functools
import inspect
import random
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from releases import as_released
from sinkwindow import StreamingCache
from wide_norms import keep_norms_wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from sinkwindow.retention import EvictMode

EXACT: Final = 1e-9  # largest logit difference in float64
VOCABULARY: Final = 32
WEIGHT_STD: Final = 0.35
MAX_SINKS, MAX_WINDOW, MAX_BUFFER = 4, 8, 5
MAX_CAPACITY: Final = MAX_SINKS + MAX_WINDOW + MAX_BUFFER + 1  # longest list of any drawn rule [tokens]
# `cache=` replaced `past_key_values=` in transformers 5.24.
CACHE_NAME: Final = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

FAMILIES: Final[dict[str, tuple[Any, Any]]] = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ROPES: Final = ("default", "linear", "dynamic", "yarn")  # dynamic switches on positions, yarn scales cosines and sines


def budget(share: float) -> settings:
    """Return settings with a share of the profile's examples: less than 1 for slow tests, more for important ones."""
    return settings(max_examples=max(5, int(settings().max_examples * share)))


# -- the rule -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Sizes of a stream [tokens]."""

    num_sinks: int
    window: int
    buffer: int = 0
    evict: EvictMode = "token"

    @property
    def limit(self) -> int:
        """Length of the list after an eviction."""
        return self.num_sinks + self.window

    @property
    def capacity(self) -> int:
        """Length of the longest list."""
        return self.limit + self.buffer + 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the cache and of the reference."""
        return asdict(self)

    def cache(self, model: nn.Module, **kwargs: Any) -> StreamingCache:
        """Make a cache that follows the rule."""
        return StreamingCache(model, **self.arguments, **kwargs)


BOTH: Final[tuple[EvictMode, ...]] = ("token", "call")


def rules(evict: Sequence[EvictMode] = ("token",)) -> st.SearchStrategy[Rule]:
    """Draw the number of sinks (S), the window (W), the buffer (B) and the eviction mode."""
    return st.builds(
        Rule,
        num_sinks=st.integers(0, MAX_SINKS),
        window=st.integers(1, MAX_WINDOW),
        buffer=st.integers(0, MAX_BUFFER),
        evict=st.sampled_from(evict),
    )


# -- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """The specification of a tiny model; `model` builds it."""

    family: str = "llama"
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    rotary_fraction: float = 1.0
    rope: str = "default"
    max_positions: int = 64
    attention: str = "sdpa"

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """Return the model. Equal specifications share one object, so do not change it."""
        return _build(self, dtype)

    def with_(self, **changes: Any) -> ModelSpec:
        """Return a variant."""
        return replace(self, **changes)


@functools.lru_cache(maxsize=128)
def _build(spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    model = fresh_model(spec)
    for parameter in model.parameters():  # not `model.to`: that would round the frequencies of the rotation, too
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        keep_norms_wide(model)
    return model


def fresh_model(spec: ModelSpec, **changes: Any) -> PreTrainedModel:
    """Build a new float32 model, with changes to its config."""
    make_config, make_model = FAMILIES[spec.family]
    with torch.random.fork_rng():
        model = cast("PreTrainedModel", make_model(make_config(**as_released(_config(spec) | changes))))
    model.train(mode=False).requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(spec.layers * 10_000 + spec.heads * 100 + spec.head_dim)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(std=WEIGHT_STD, generator=generator)
        parameter.copy_(parameter.bfloat16())
    return model


def _rope(spec: ModelSpec) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": spec.rope, "rope_theta": 100.0}
    if spec.rope == "yarn":
        return rope | {"factor": spec.max_positions / 8, "original_max_position_embeddings": 8}
    return rope if spec.rope == "default" else rope | {"factor": 4.0}


def _config(spec: ModelSpec) -> dict[str, Any]:
    rope = _rope(spec)
    own: dict[str, Any] = {"num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim}
    if spec.family == "gpt_neox":
        own, rope["partial_rotary_factor"] = {}, spec.rotary_fraction
    if spec.family == "mistral":
        own["sliding_window"] = None
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": spec.heads * spec.head_dim,
        "intermediate_size": 24,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions,
        "rope_parameters": rope,
        "attn_implementation": spec.attention,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **own,
    }


@st.composite
def model_specs(draw: st.DrawFn, ropes: Sequence[str] = ROPES) -> ModelSpec:
    """Draw a model with enough trained positions for the longest list of any drawn rule, often exactly enough."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    heads = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    neox = family == "gpt_neox"
    return ModelSpec(
        family=family,
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=heads if neox else kv_heads,
        head_dim=draw(st.sampled_from([16, 32] if neox else [8, 16])),  # dynamic rope needs more than one pair
        rotary_fraction=draw(st.sampled_from([0.25, 0.5, 1.0])) if neox else 1.0,
        rope=draw(st.sampled_from(ropes)),
        max_positions=draw(st.sampled_from([MAX_CAPACITY, 25, 40, 2048])),
    )


# -- sequences and calls --------------------------------------------------------------------------------------------


def seeds() -> st.SearchStrategy[int]:
    """Draw a seed for random tokens."""
    return st.integers(0, 2**16)


def tokens(seed: int, batch: int, columns: int) -> Tensor:
    """Return random tokens, `[batch, columns]`."""
    return torch.randint(0, VOCABULARY, (batch, columns), generator=torch.Generator().manual_seed(seed))


@st.composite
def splits(draw: st.DrawFn, least: int = 1, most: int = 90) -> list[int]:
    """Draw the lengths of the calls that feed a sequence: a first length, then a repeated pattern.

    `[30, 1, 1, ...]` is prefill and decode, `[70]` is longer than any drawn cache, `[1, 9, 1, 9, ...]` is mixed.
    """
    total = draw(st.integers(least, most))
    pattern = [draw(st.integers(1, total)), *draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))]
    lengths: list[int] = []
    while sum(lengths) < total:
        length = pattern[min(len(lengths), 1 + (len(lengths) - 1) % (len(pattern) - 1))]
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def padding_mask(seed: int, batch: int, lengths: Sequence[int], *, holes: bool) -> Tensor:
    """Return a mask `[batch, columns]` with padding at the left of the first call, and of some later ones if `holes`.

    A whole call may be padding for a row, except the last call: every row has a token.
    """
    dice = random.Random(seed)  # noqa: S311 - not a secret
    mask = torch.ones(batch, sum(lengths), dtype=torch.long)
    start = 0
    for index, length in enumerate(lengths):
        last = index == len(lengths) - 1
        for row in range(batch):
            if index == 0 or (holes and dice.random() < 0.4):
                mask[row, start : start + dice.randint(0, length - last)] = 0
        start += length
    return mask


def real_per_call(real: Tensor, lengths: Sequence[int]) -> list[int]:
    """Return how many real tokens of a row, `[columns]`, each call has; calls without any are left out."""
    counts = [int(part.sum()) for part in torch.split(real, list(lengths))]
    return [count for count in counts if count]


def call(model: PreTrainedModel, cache: object, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Call the model once and return its logits, `[batch, columns, vocab]`."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **{CACHE_NAME: cache}).logits
    return logits


def stepwise(
    model: PreTrainedModel, cache: object, ids: Tensor, lengths: Sequence[int], mask: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Feed a sequence call by call; after each call yield the number of columns fed so far and the call's logits."""
    end = 0
    for length in lengths:
        end += length
        seen = None if mask is None else mask[:, :end]
        yield end, call(model, cache, ids[:, end - length : end], seen)


def stream(
    model: PreTrainedModel, cache: object, ids: Tensor, lengths: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Feed a sequence call by call and return all logits, `[batch, columns, vocab]`."""
    return torch.cat([logits for _, logits in stepwise(model, cache, ids, lengths, mask)], dim=1)


def worst(difference: Tensor) -> float:
    """Return the largest absolute value: infinity if any value is NaN, 0 for an empty tensor."""
    return max(difference.abs().nan_to_num(nan=torch.inf).flatten().tolist(), default=0.0)


def observe(cache: StreamingCache) -> tuple[Any, ...]:
    """Return everything that can be observed of a cache."""
    return (
        cache.retained_tokens,
        cache.seen_tokens,
        cache.num_evictions,
        cache.nbytes,
        cache.get_seq_length(),
        [cache.get_mask_sizes(3, layer) for layer in range(len(cache.layers))],
    )
