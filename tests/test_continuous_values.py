"""What callers get wrong: a manager refuses it by name, before it reaches the thread that runs all requests."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pytest
import torch

from releases import UNPAGED
from strategies import EXACT, ModelSpec, fresh_model

if UNPAGED:  # what is imported below is not there
    pytest.skip(UNPAGED, allow_module_level=True)

from transformers import ContinuousBatchingConfig

from sinkwindow.continuous import StreamingBatchingManager
from sinkwindow.continuous.checks import OPTIONS, REFUSED, UNREAD
from test_continuous import RULE, SIZES, Driver, generation, manager_of


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, r"input_ids must hold at least 1 token\(s\), got \[\]"),
        ([1, 32], ValueError, "Each of input_ids must be at most 31, got 32"),
        ([-1], ValueError, "Each of input_ids must be at least 0, got -1"),
        ([1.5], TypeError, "Each of input_ids must be an int, got 1.5"),
        ("ab", TypeError, "Each of input_ids must be an int, got 'a'"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt: Any, error: type[Exception], message: str) -> None:
    """With the value; the requests of others are not affected."""
    driver = Driver(manager_of(ModelSpec().model()))
    driver.add("good", [1, 2, 3], 20)
    with pytest.raises(error, match=message):
        driver.add("bad", prompt, 20)
    driver.finish()
    assert set(driver.texts) == {"good"}
    assert driver.error("good", RULE) < EXACT


def sampling(**options: Any) -> StreamingBatchingManager:
    """Return a manager that samples by all that a request may choose."""
    chosen = generation(do_sample=True, temperature=0.7, top_k=9, top_p=0.9, max_new_tokens=40, eos_token_id=-1)
    config = ContinuousBatchingConfig(**SIZES | options)
    return StreamingBatchingManager(
        fresh_model(ModelSpec()), 2, 6, 1, continuous_batching_config=config, generation_config=chosen
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", ["5", math.nan, 2.5, True, 0, -3]),
        ("eos_token_id", ["2", 2.0, [3, "2"], -2, torch.tensor(3.0)]),
        ("temperature", [0.0, 1e-300, math.nan, math.inf, -1, "1", None, True]),
        ("top_k", [0, 1.5, "1", None]),
        ("top_p", [-0.1, 1.1, math.nan, "1", None]),
        ("request_id", [5, [1], b"a"]),
        ("streaming", ["no", 1, None]),
        ("record_timestamps", ["no", 1, None]),
        ("input_ids", [5, None, math.nan]),
    ],
)
def test_a_bad_value_is_refused_before_it_is_queued(name: str, values: list[Any]) -> None:
    """By name, in its caller's thread: the thread of all callers would end on it."""
    manager = sampling(per_request_processors=True)
    driver = Driver(manager)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^(Each of )?{name} must be .*, got "):
            manager.add_request(**{"input_ids": [1, 2, 3]} | {name: value})
    assert manager.input_queue.empty()
    driver.add("good", [1, 2, 3], 20)
    assert set(driver.finish()) == {"good"}


@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"top_q": 1}])
def test_options_of_a_request_that_have_no_effect_are_refused(option: dict[str, Any]) -> None:
    """A manager reads them only if it was made to."""
    with pytest.raises(ValueError, match=r"of a request has no effect, only \[\] here: .*per_request_processors=True"):
        sampling().add_request([1, 2, 3], **option)


def test_values_are_read_as_numbers() -> None:
    """A token that ends a text may be in a list or a tensor, and a temperature may be an integer."""
    manager = sampling(per_request_processors=True)
    driver = Driver(manager)
    manager.add_request([1, 2, 3], "free", max_new_tokens=30, temperature=1, top_k=1, top_p=1)
    last = driver.finish()["free"][6]
    for number, end in enumerate((last, [last], torch.tensor(last)[None], torch.tensor([0, last]).numpy())):
        manager.add_request([1, 2, 3], str(number), max_new_tokens=30, top_k=1, eos_token_id=cast("Any", end))
        assert driver.finish()[str(number)][-1] == last


def test_an_id_that_is_none_cannot_be_cancelled() -> None:
    """The thread of all callers would end on it."""
    manager = manager_of(ModelSpec().model())
    with pytest.raises(TypeError, match=r"request_id must be a str, got \[1\] of type list"):
        manager.cancel_request(cast("Any", [1]))
    assert manager.cancel_queue.empty()


def test_one_token_cannot_be_continued_in_several_ways() -> None:
    """Of a prompt all but the last token is read before it is copied."""
    manager = manager_of(ModelSpec().model(), sample=True)
    manager.num_return_sequences = 2
    with pytest.raises(ValueError, match=r"at least 2 token\(s\), got \[1\], for 2 sequence\(s\)"):
        manager.add_request([1])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 of the generation_config has no effect"),
        ({"stop_strings": ["a"]}, "stop_strings="),
        ({"max_length": 20}, "max_length=20 of the generation_config has no effect"),
        ({"min_new_tokens": 5}, "min_new_tokens=5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 of the generation_config"),
        ({"typical_p": 0.5, "do_sample": True}, "TypicalLogitsWarper, which an option"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 of the generation_config"),
        ({"encoder_repetition_penalty": 3.0}, "encoder_repetition_penalty=3.0 of the generation_config"),
        ({"encoder_no_repeat_ngram_size": 1}, "encoder_no_repeat_ngram_size=1 of the generation_config"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids="),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens="),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "exponential_decay_length_penalty="),
        ({"token_healing": True}, "token_healing=True of the generation_config"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 of the generation_config"),
    ],
)
def test_options_that_would_be_left_out_are_refused(option: dict[str, Any], message: str) -> None:
    """Other tokens would come, in silence."""
    with pytest.raises(ValueError, match=message):
        StreamingBatchingManager(ModelSpec().model(), 2, 6, 1, generation_config=generation(eos_token_id=-1, **option))


def test_every_option_of_a_generation_config_is_known() -> None:
    """Each one is read, refused by its name or by that of its processor, or changes no token that one beam gives."""
    read = "do_sample temperature top_k top_p max_new_tokens num_return_sequences eos_token_id pad_token_id"
    processors = (
        "guidance_scale sequence_bias suppress_tokens forced_bos_token_id forced_eos_token_id min_p top_h typical_p "
        "epsilon_cutoff eta_cutoff remove_invalid_values renormalize_logits watermarking_config"
    )
    same = (
        "early_stopping length_penalty diversity_penalty low_memory decoder_start_token_id is_assistant use_cache "
        "bos_token_id num_assistant_tokens num_assistant_tokens_schedule max_matching_ngram_size max_cache_len "
        "prefill_chunk_size target_lookbehind speculation_type use_mtp disable_compile compile_config "
        "continuous_batching_config return_dict_in_generate transformers_version"
    )
    prefixes = "assistant_", "output_", "cache_", "_"
    names = {name for name in vars(generation()) if not name.startswith(prefixes)}
    assert names <= {*UNREAD, *read.split(), *processors.split(), *same.split()}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_are_read_as_the_cache_reads_its_own(name: str) -> None:
    """Negative ones, no number, and what is no value at all: before the thread of all callers reads them."""
    values: tuple[Any, ...] = (-1, math.nan, "a", [], 2**70)
    for value in values:
        config = ContinuousBatchingConfig()
        setattr(config, name, value)
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*, got "):
            StreamingBatchingManager(ModelSpec().model(), 2, 6, 1, continuous_batching_config=config)


def test_every_option_is_known() -> None:
    """Each field of a configuration is read, refused, or set by the rule; those that may be None may stay so."""
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    set_by_rule = {"max_blocks_per_request", "allow_block_sharing", "auto_switch_to_flash", "scheduler_type"}
    renamed = {"use_default_compile_configs", "max_cached_graphs", "block_size"}
    assert names == {*OPTIONS, *REFUSED} | set_by_rule | renamed
    assert manager_of(ModelSpec().model(), cpu_offload_space=None, seed=None).continuous_batching_config.seed is None
    with pytest.raises(TypeError, match="page_size must be an int, got None"):
        manager_of(ModelSpec().model(), page_size=None)


@pytest.mark.parametrize("name", ["generation_config", "continuous_batching_config"])
def test_configurations_are_of_their_kind(name: str) -> None:
    """An empty dict is no configuration either."""
    values: tuple[Any, ...] = ({}, "greedy")
    for value in values:
        with pytest.raises(TypeError, match=f"{name} must be a .*Config, got {value!r}"):
            StreamingBatchingManager(ModelSpec().model(), 2, 6, 1, **{name: cast("Any", value)})


@pytest.mark.parametrize("name", ["max_new_tokens", "num_return_sequences"])
def test_numbers_of_a_generation_config_are_read(name: str) -> None:
    """Every request would inherit them."""
    for value in ("5", 2.5, 0, -1):
        config = generation(eos_token_id=-1)
        setattr(config, name, value)
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*, got "):
            StreamingBatchingManager(ModelSpec().model(), 2, 6, 1, generation_config=config)
