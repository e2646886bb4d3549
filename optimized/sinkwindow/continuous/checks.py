"""Checks of a manager's model and options, before anything changes, and the sizes that follow from the rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils.generic import is_flash_attention_requested

from sinkwindow.arguments import MOST_TOKENS, read_choice, read_float, read_int
from sinkwindow.continuous.allocator import ring_of
from sinkwindow.model.families import decoder_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow.model.families import ModelFacts
    from sinkwindow.retention import Retention

STREAMS = 64  # requests at a time, where the configuration names no number
LEAST_PAGE = 4  # of transformers [tokens]
BATCH_TOKENS = 256  # at least, so that prompts are read in large calls
# Options of a generation config that are not read, and their values that change nothing.
UNREAD: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "token_healing"), 0),
    **dict.fromkeys(("max_length", "max_time", "min_new_tokens", "prompt_lookup_num_tokens", "stop_strings")),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty")),
    **dict.fromkeys(("constraints", "force_words_ids", "penalty_alpha", "dola_layers")),
}
DROP = "pass a generation_config without it (and max_new_tokens for a length)"
CURES = {
    "has no head that gives logits": "the model around it",
    "attends eagerly": 'model.set_attn_implementation("sdpa")',
    "is in training mode": "model.eval()",
}
# Options of ContinuousBatchingConfig that need requests of a fixed shape, or a second batch under preparation.
REFUSED = (
    "use_cuda_graph",
    "use_async_batching",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
)
# How the other options of ContinuousBatchingConfig are read. The thread that runs all requests reads them next.
SIZE, SHARE, FLAG = (read_int, 1, MOST_TOKENS), (read_float, 0, 1), (read_choice, (False, True))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "page_size": (read_int, LEAST_PAGE, MOST_TOKENS),
    **dict.fromkeys(("max_requests_per_batch", "num_blocks", "max_batch_tokens"), SIZE),
    **dict.fromkeys(
        ("max_queue_size", "q_padding_interval_size", "kv_padding_interval_size"), (read_int, 0, MOST_TOKENS)
    ),
    "seed": (read_int, 0, 2**63 - 1),
    **dict.fromkeys(("safety_margin", "max_memory_percent", "cpu_offload_space_safety_threshold"), SHARE),
    **dict.fromkeys(("cpu_offload_space", "cpu_group_timeout"), (read_float, 0, MOST_TOKENS)),
    **dict.fromkeys(("return_logprobs", "per_request_processors"), FLAG),
    **dict.fromkeys(("drop_unsupported_processors", "disable_nccl_graph_mixing"), FLAG),
}
# How options of a single request are read: logits divided by less than the least temperature are not finite in float32.
PER_REQUEST: dict[str, tuple[Any, ...]] = {"temperature": (read_float, 1e-6, 1e6), "top_k": SIZE, "top_p": SHARE}


def check_types(**configs: object) -> None:
    """Refuse configurations that are none.

    Raises:
        TypeError: One is neither None nor a configuration of its kind; the message names it.
    """
    kinds = {"generation_config": GenerationConfig, "continuous_batching_config": ContinuousBatchingConfig}
    for name, config in configs.items():
        if config is not None and not isinstance(config, kinds[name]):
            raise TypeError(f"{name} must be a {kinds[name].__name__}, got {config!r} of type {type(config).__name__}.")


def check_generation(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Refuse what continuous batching would leave out of a generation config: other tokens would come, in silence.

    Raises:
        TypeError: A number of tokens or sequences is no integer.
        ValueError: There is such an option, or a number is less than 1; the message names it.
    """
    for name in ("max_new_tokens", "num_return_sequences"):
        if getattr(config, name) is not None:
            read_int(name, getattr(config, name), 1, MOST_TOKENS)
    for name, usual in UNREAD.items():
        value = getattr(config, name, None)
        if value not in (None, usual) and not (name == "max_length" and config.max_new_tokens is not None):
            raise ValueError(f"{name}={value!r} of the generation_config has no effect in continuous batching: {DROP}.")
    for processor in cast("Any", model)._get_logits_processor(config):  # noqa: SLF001 - as the manager does
        if not getattr(processor, "supports_continuous_batching", False):
            raise ValueError(
                f"{type(processor).__name__}, which an option of the generation_config asks for, does not work in "
                f"continuous batching: {DROP}."
            )


def check_model(model: PreTrainedModel, facts: ModelFacts) -> None:
    """Refuse a model that transformers batches in other ways, or that our positions do not fit.

    Raises:
        ValueError: It is one; the message says why, and what to use.
    """
    attention, decoder = model.config._attn_implementation, decoder_of(model)  # noqa: SLF001 - it has no public name
    reasons = {
        "has no head that gives logits": model is decoder,
        "has layers with a sliding window": len(facts.kinds) > 1 or facts.native_window is not None,
        "has layers that keep a state": bool(facts.states),
        "bypasses AttentionInterface": facts.own_attention,
        "has frequencies or a table that depend on the largest position": facts.length_dependent or facts.has_table,
        "has no rotary positions": not facts.kinds[0].rotary.inv_freq.numel(),
        "reads images too": model.config is not decoder.config,
        "has layers that attend to the keys of another": bool(facts.borrowers),
        "attends eagerly": attention == "eager",  # paged, it makes weights in float32
        "is in training mode": model.training,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is None and not _tells_cache(model):
        found = "does not tell its cache of the batch"
    if found is not None:
        raise ValueError(
            f"{type(model).__name__} {found}, which continuous batching does not allow: use "
            f"{CURES.get(found, 'a StreamingCache with padded rows')}."
        )


class _Probe(PagedAttentionCache):
    """A cache that notes whether it is told of the batch, and keeps nothing."""

    told = True

    def __init__(self) -> None:  # a model needs to know its type only
        pass

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        self.told = self.told and "cu_seq_lens_k" in (kwargs or {})
        return key, value


@torch.no_grad()
def _tells_cache(model: PreTrainedModel) -> bool:
    """Return whether all layers hand the batch's arguments on to the cache: found out by a call of one token."""
    probe, zero = _Probe(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=model.device)
    more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 1, "max_length_k": 1}
    mask = None if is_flash_attention_requested(model.config) else zero[None, None].to(model.dtype)
    model(input_ids=zero, position_ids=zero, attention_mask=mask, cache=probe, use_cache=False, **more)
    return probe.told


def fill_config(config: ContinuousBatchingConfig, rule: Retention) -> None:
    """Refuse options that do not fit, and fill in the sizes that the rule gives.

    Raises:
        TypeError: An option has another type than it must have.
        ValueError: An option does not fit.
    """
    for name in REFUSED:
        value = getattr(config, name)
        if value not in (None, False, (False, False)):  # 0 is False
            raise ValueError(f"{name}={value!r} needs requests of a fixed shape: leave it out.")
    if config.scheduler_type != "fifo":
        raise ValueError(f"scheduler_type={config.scheduler_type!r} is not supported: use 'fifo'.")
    for name, (read, *bounds) in OPTIONS.items():
        value = getattr(config, name)
        if value is not None or "None" not in str(ContinuousBatchingConfig.__annotations__[name]):
            setattr(config, name, read(name, value, *bounds))
    config.max_requests_per_batch = config.max_requests_per_batch or STREAMS
    slots = rule.num_sinks + ring_of(rule)
    per_request = -(-slots // config.page_size)
    if config.page_size == ContinuousBatchingConfig.page_size and config.num_blocks is None:
        config.page_size = max(LEAST_PAGE, -(-slots // per_request))  # as many pages, and hardly a slot too much
    config.num_blocks = config.num_blocks or config.max_requests_per_batch * per_request
    if config.num_blocks < per_request:
        raise ValueError(
            f"num_blocks={config.num_blocks} of page_size={config.page_size} tokens hold no request, which needs "
            f"{per_request} of them: leave it out, or choose a smaller window."
        )
    config.max_batch_tokens = config.max_batch_tokens or max(config.max_requests_per_batch, BATCH_TOKENS)
    if config.safety_margin is None:
        config.safety_margin = 0.0  # a request that has begun needs no more than its share
    config.allow_block_sharing, config.max_blocks_per_request = False, 0
    config.use_async_batching = config.use_cuda_graph = False
    config.auto_switch_to_flash = False  # which would change the model under other callers
