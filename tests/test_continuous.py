"""Requests of a continuous batch each give the logits of that request alone, and take no more memory with time.

Logits are compared with the reference run over the request's text, whatever way its tokens were chosen.
"""

from __future__ import annotations

import doctest
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from families import BATCHED, FAMILIES, FLOAT32_ISLAND, build
from releases import UNPAGED
from sinkwindow import StreamingCache
from sinkwindow_reference import reference_logits
from strategies import EXACT, ModelSpec, Rule, budget, fresh_model, rules, seeds, tokens, worst

if UNPAGED:  # what is imported below is not there
    pytest.skip(UNPAGED, allow_module_level=True)

from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from sinkwindow.continuous import StreamingBatchingManager, check_contract
from sinkwindow.continuous.allocator import SinkWindowAllocator, ring_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

RULE = Rule(2, 6, 1)
SIZES = {"page_size": 4, "max_requests_per_batch": 4, "max_batch_tokens": 16}
ROUTED_IN_FLOAT32 = {"ernie4_5_moe", "dots1", "glm4_moe", "minimax_m2"}


def manager_of(
    model: PreTrainedModel, rule: Rule = RULE, *, sample: bool = False, **options: Any
) -> StreamingBatchingManager:
    """Return a manager with small sizes."""
    sizes = (rule.num_sinks, rule.window, rule.buffer)
    config = ContinuousBatchingConfig(**SIZES | options)
    chosen = generation(do_sample=sample, max_new_tokens=40, eos_token_id=-1)
    return StreamingBatchingManager(model, *sizes, continuous_batching_config=config, generation_config=chosen)


def generation(**options: Any) -> GenerationConfig:
    """Return a generation config; transformers does not type it."""
    return GenerationConfig(**options)  # type: ignore[no-untyped-call]


class Driver:
    """The loop of a manager, step by step, with the logits of every request by the number of tokens before them."""

    def __init__(self, manager: StreamingBatchingManager) -> None:
        self.manager, self.model = manager, cast("PreTrainedModel", manager.model)
        self.processor = manager.batch_processor = manager._create_batch_processor()
        allocator = self.processor.cache.layer_to_allocator[0]
        assert isinstance(allocator, SinkWindowAllocator)
        self.allocator = allocator
        self.inputs: Any = self.processor.inputs_and_outputs
        self.logits: dict[str, dict[int, Tensor]] = {}
        self.texts: dict[str, list[int]] = {}

    def add(self, request_id: str, prompt: list[int], new: int) -> None:
        """Queue a request."""
        self.manager.add_request(prompt, request_id=request_id, max_new_tokens=new)

    def step(self) -> bool:
        """Run a batch; return whether there was one."""
        if not self.processor.prepare_next_batch():
            return False
        hook = self.model.register_forward_hook(self._record)
        try:
            self.processor._generation_step(self.model)
        finally:
            hook.remove()
        self.processor.update_batch()
        return True

    def finish(self) -> dict[str, list[int]]:
        """Run until nothing is left, and return the texts of the requests that have ended."""
        steps = 0
        while self.step():
            steps += 1
            assert steps < 5_000, "some request never ends"
        while (output := self.manager.get_result(timeout=0)) is not None:
            assert output.error is None
            self.texts[output.request_id] = output.prompt_ids + output.generated_tokens
        return self.texts

    def _record(self, _module: Any, _args: Any, output: Any) -> None:
        batch = self.inputs.requests_in_batch
        states = [one.state for one in batch if one.has_new_token]
        for row, state in zip(output.logits[0], states, strict=False):  # rows of prompts that go on come last
            seen = len(state.initial_tokens) + len(state.generated_tokens)
            self.logits.setdefault(state.request_id, {})[seen] = row.clone()

    def error(self, request_id: str, rule: Rule) -> float:
        """Return the largest difference of a request's logits from the reference."""
        ids = torch.tensor([self.texts[request_id]])
        alone = reference_logits(self.model, ids, **rule.arguments)[0]
        return max(worst(logits - alone[seen - 1]) for seen, logits in self.logits[request_id].items())


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, int, int, int | None]]:
    """Draw when each request joins, how many tokens it brings and wants, and after how many steps it is cancelled."""
    one = st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(1, 30), st.none() | st.integers(1, 25))
    return draw(st.lists(one, min_size=1, max_size=5))


@budget(0.2)
@given(
    rule=rules(),
    seed=seeds(),
    requests=workloads(),
    page=st.integers(4, 9),
    spare=st.integers(0, 12),
    batch=st.integers(4, 20),
    positions=st.sampled_from([24, 64]),
    sample=st.booleans(),
)
def test_every_request_is_as_alone(
    rule: Rule,
    seed: int,
    requests: list[tuple[int, int, int, int | None]],
    page: int,
    spare: int,
    batch: int,
    positions: int,
    *,
    sample: bool,
) -> None:
    """Requests join, wait, are pre-empted for want of blocks, resumed and cancelled; at the end no block is in use."""
    model = ModelSpec(layers=2, heads=2, max_positions=positions).model()
    least = -(-(rule.num_sinks + ring_of(rule)) // page)  # type: ignore[arg-type]  # has the sizes of a Retention
    manager = manager_of(model, rule, sample=sample, page_size=page, num_blocks=least + spare, max_batch_tokens=batch)
    driver, ids = Driver(manager), tokens(seed, 1, 200)[0].tolist()
    for number in range(40):
        for name, (joins, prompt, new, leaves) in enumerate(requests):
            if joins == number:
                driver.add(str(name), ids[name : name + prompt], new)
            if leaves is not None and joins + leaves == number:
                manager.cancel_request(str(name))
        driver.step()
    texts = driver.finish()
    assert not driver.processor.has_pending_requests()
    for name, (_, prompt, new, leaves) in enumerate(requests):
        assert str(name) in texts or leaves is not None
        if str(name) in texts:
            assert len(texts[str(name)]) == prompt + new
            assert driver.error(str(name), rule) < EXACT
    driver.processor.cache.pool.try_to_free_sectors()
    assert driver.processor.cache.compute_free_capacity() == 1.0


@pytest.mark.parametrize("family", sorted(BATCHED))
def test_families_are_exact(family: str) -> None:
    """Of every family that can be batched so, past evictions, rebases and pre-emption."""
    model = build(family, "sdpa")
    driver = Driver(manager_of(model, num_blocks=5))
    for name, length in enumerate((3, 20)):
        driver.add(str(name), tokens(name, 1, length)[0].tolist(), 50)
    driver.finish()
    island = FLOAT32_ISLAND if family in ROUTED_IN_FLOAT32 else EXACT
    assert max(driver.error(name, RULE) for name in ("0", "1")) < island


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - BATCHED))
def test_other_families_are_refused_by_name(family: str) -> None:
    """What transformers batches in other ways, or not at all, is refused with the reason before anything changes."""
    model = build(family)
    attention = model.config._attn_implementation
    with pytest.raises(ValueError, match="which continuous batching does not allow: use "):
        manager_of(model)
    assert model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("space", [0.0, 0.01])
def test_requests_are_pre_empted_and_resumed(space: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks for one request and a half, three are pre-empted: read again, or copied to the host and back."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: empty(*size, **more | {"pin_memory": False}))
    driver = Driver(manager_of(ModelSpec().model(), num_blocks=5, cpu_offload_space=space))
    manager, copied = driver.processor.offloading_manager, list[int]()
    to_host = manager._offload_to_cpu

    def counted(*arguments: Any) -> set[str]:
        moved = to_host(*arguments)
        copied.append(len(moved))
        return moved

    monkeypatch.setattr(manager, "_offload_to_cpu", counted)
    for name in "abc":
        driver.add(name, tokens(ord(name), 1, 5)[0].tolist(), 90)
    driver.finish()
    assert copied
    assert (sum(copied) > 0) == (space > 0)
    assert max(driver.error(name, RULE) for name in "abc") < EXACT


def test_memory_is_flat() -> None:
    """A request of 3,000 tokens has the blocks of one of 30, and the positions of a bounded one."""
    model = ModelSpec(max_positions=64).model()
    driver = Driver(manager_of(model))
    driver.add("long", [1, 2, 3], 3_000)
    blocks, positions = set(), set()
    for number in range(3_000):
        driver.step()
        if number > 30:
            blocks.add(len(driver.allocator.block_table.get("long", [])))
            positions.add(int(driver.inputs.position_ids[0]))
    per_request = -(-(RULE.num_sinks + ring_of(RULE)) // 4)  # type: ignore[arg-type]
    assert blocks <= {per_request, 0}
    assert max(positions) < driver.allocator.bound == 64
    driver.finish()
    assert driver.error("long", RULE) < EXACT


def test_children_go_on_from_their_parent() -> None:
    """Several sequences of one prompt copy its cache, and each gives its own text's logits."""
    model = ModelSpec().model()
    manager = manager_of(model, sample=True)
    manager.num_return_sequences = 3
    driver = Driver(manager)
    driver.add("a", tokens(3, 1, 12)[0].tolist(), 25)
    texts = driver.finish()
    assert sorted(texts) == ["a", "a__child#0", "a__child#1"]
    assert len({tuple(text) for text in texts.values()}) == 3
    assert max(driver.error(name, RULE) for name in texts) < EXACT


def test_the_model_finds_it() -> None:
    """`generate_batch` uses the manager while it serves, twice over, and transformers' own before and after."""
    model, prompts = cast("Any", fresh_model(ModelSpec())), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    manager = manager_of(model)
    with manager.serving():
        texts = [
            [output.generated_tokens for output in model.generate_batch(prompts, max_new_tokens=30).values()]
            for _ in range(2)
        ]
    cache = {"cache": StreamingCache(model, **RULE.arguments)}
    alone = model.generate(torch.tensor(prompts[:1]), max_new_tokens=30, do_sample=False, **cache)
    assert texts[0] == texts[1]
    assert prompts[0] + texts[0][0] == alone[0].tolist()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_the_example_of_its_docstring() -> None:
    """It prints what it says."""
    names = {"model": fresh_model(ModelSpec()), "StreamingBatchingManager": StreamingBatchingManager}
    (example,) = (one for one in doctest.DocTestFinder().find(StreamingBatchingManager, globs=names) if one.examples)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_two_managers_do_not_share_a_model_by_accident() -> None:
    """A second one is refused while the first serves, and the first is not affected."""
    model: Any = fresh_model(ModelSpec())
    with manager_of(model).serving() as first:
        with pytest.raises(ValueError, match="keeps another manager"), manager_of(model).serving():
            pass
        assert model.init_continuous_batching() is first


def test_others_see_nothing_of_it() -> None:
    """A plain call between two batches returns the same bits, and no hook is left when the manager is gone."""
    model: Any = fresh_model(ModelSpec())
    ids = tokens(1, 1, 20)
    before, hooks = model(ids).logits, len(model.model._forward_pre_hooks)
    driver = Driver(manager_of(model))
    driver.add("a", [1, 2, 3], 20)
    for _ in range(5):
        driver.step()
        assert torch.equal(model(ids).logits, before)
    del driver
    assert len(model.model._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph=True needs requests of a fixed shape: leave it out"),
        ({"default_compile_level": 1}, "default_compile_level=1 needs"),
        ({"use_async_batching": True}, "use_async_batching=True needs"),
        ({"scheduler_type": "prefill_first"}, "scheduler_type='prefill_first' is not supported: use 'fifo'"),
        ({"num_blocks": 2}, "num_blocks=2 of page_size=4 tokens hold no request, which needs 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    """With the option, its value and the way out."""
    with pytest.raises(ValueError, match=message):
        manager_of(ModelSpec().model(), **options)


def test_a_model_in_training_mode_is_refused() -> None:
    """It would be switched to evaluation mode for other callers, too."""
    model = fresh_model(ModelSpec()).train()
    with pytest.raises(ValueError, match=r"is in training mode.*use model.eval\(\)"):
        manager_of(model)
    assert model.training


def test_pages_fit_the_requests() -> None:
    """Of 4 + 1,105 slots transformers' pages of 256 tokens would leave 171 empty, ours leave one."""
    config = manager_of(ModelSpec(max_positions=2048).model(), Rule(4, 1020, 64), page_size=256)
    sizes = config.continuous_batching_config
    assert (sizes.page_size, sizes.num_blocks) == (222, 4 * 5)


def test_the_callers_configurations_stay() -> None:
    """What is filled in is filled into copies."""
    model, config, chosen = ModelSpec().model(), ContinuousBatchingConfig(), generation()
    before = (vars(config).copy(), chosen.to_dict())
    StreamingBatchingManager(model, 2, 6, 1, continuous_batching_config=config, generation_config=chosen)
    assert (vars(config), chosen.to_dict()) == before


def test_a_release_with_other_private_parts_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract holds for this release, and one method that takes other arguments is named."""
    check_contract()

    def schedule_batch(self: Any, budget: int) -> None:
        raise AssertionError((self, budget))

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", schedule_batch)
    with pytest.raises(
        ImportError, match=r"overrides FIFOScheduler.schedule_batch\(self, token_budget, cache_budget\)"
    ):
        manager_of(ModelSpec().model())


def test_the_private_parts_that_are_read_are_there() -> None:
    """Names the attributes that a release lacks, of those that are read and set besides the overridden methods."""
    driver = Driver(manager_of(ModelSpec().model()))
    cache, processor = driver.processor.cache, driver.processor
    for owner, names in (
        (cache, "cache_allocators layer_to_allocator read_cache_limit bytes_per_sector num_sectors cache_tensor pool"),
        (driver.allocator, "block_table block_physical_stride tokens_per_page layer_indices _kv_token_views"),
        (processor.scheduler, "cache safety_margin max_requests_per_batch active_requests waiting_requests"),
        (processor.offloading_manager, "scheduler"),
        (driver.manager, "input_queue cancel_queue logit_processor _request_lock _fail_all_remaining_requests"),
        (driver.manager.logit_processor, "supported_keys"),
        (driver.manager.output_router, "output_queue"),
        (driver.manager.background_thread_status, "can_accept_new_requests"),
        (RequestState("a", [1]), "request_id position_offset"),
    ):
        assert [name for name in names.split() if not hasattr(owner, name)] == []
