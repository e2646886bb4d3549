"""Who else uses the model, and requests of several users: a manager changes nothing for others, and mixes nothing."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import pytest
import torch

from releases import UNPAGED
from sinkwindow import StreamingCache
from strategies import EXACT, ModelSpec, fresh_model, tokens, worst

if UNPAGED:  # what is imported below is not there
    pytest.skip(UNPAGED, allow_module_level=True)

import transformers.modeling_flash_attention_utils as flash
from transformers.generation.continuous_batching.requests import RequestState

from test_continuous import RULE, Driver, manager_of

if TYPE_CHECKING:
    from torch import Tensor


def test_other_threads_see_nothing_of_a_running_manager() -> None:
    """Calls in another thread, plain or with a cache, return the same bits as alone; the configuration is unchanged."""
    model: Any = fresh_model(ModelSpec())
    ids, before = tokens(1, 1, 20), dict(vars(model.config))
    alone = model(ids).logits
    streamed = model(ids, cache=StreamingCache(model, **RULE.arguments)).logits
    manager = manager_of(model)
    manager.start()
    try:
        request = manager.add_request([1, 2, 3], max_new_tokens=10**6, streaming=True)
        assert next(output.request_id for output in manager) == request  # it runs
        for _ in range(150):
            assert torch.equal(model(ids).logits, alone)
            assert torch.equal(model(ids, cache=StreamingCache(model, **RULE.arguments)).logits, streamed)
    finally:
        manager.stop(hard_stop=True)
    assert dict(vars(model.config)) == before


def test_a_cancelled_request_makes_room() -> None:
    """Requests that were pre-empted are resumed when another one is cancelled, not only when one ends."""
    manager = manager_of(ModelSpec().model(), num_blocks=5)
    driver = Driver(manager)
    for name in "abc":
        driver.add(name, tokens(ord(name), 1, 9)[0].tolist(), 10**6 if name == "a" else 12)
    for _ in range(50):  # until one is pre-empted
        if not driver.processor.scheduler.block_new_requests:
            assert driver.step()
    assert driver.processor.scheduler.block_new_requests
    manager.cancel_request("a")
    for _ in range(200):
        driver.step()
    assert not driver.processor.has_pending_requests()
    assert set(driver.finish()) == {"b", "c"}
    assert max(driver.error(name, RULE) for name in "bc") < EXACT


def test_it_runs_with_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of flash attention are replaced by slow ones with their checks, since none is installed here."""

    def varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, **more: Any) -> Tensor:
        assert {ends.dtype, key_ends.dtype} == {torch.int32}
        assert min(len(ends), len(key_ends)) >= 2
        groups, parts = query.shape[1] // key.shape[1], []
        for (begin, end), (first, last) in zip(_pairs(ends), _pairs(key_ends), strict=True):
            own = query[begin:end].transpose(0, 1)
            keys, values = (one[first:last].repeat_interleave(groups, 1).transpose(0, 1) for one in (key, value))
            mask = torch.ones(own.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - own.shape[1])
            scale = more["softmax_scale"]
            out = torch.nn.functional.scaled_dot_product_attention(own, keys, values, mask, scale=scale)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    def either(*tensors: Tensor, **more: Any) -> Tensor:
        assert more["causal"]
        query, key, value = tensors or (more.pop("q"), more.pop("k"), more.pop("v"))
        return varlen(query, key, value, more.pop("cu_seqlens_q"), more.pop("cu_seqlens_k"), **more)

    functions = (None, either, None, flash._pad_input, flash._unpad_input)
    named = cast("Any", flash)._lazy_define_process_function(either)
    found = functions, (named, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: found)
    model = fresh_model(ModelSpec()).double()
    model.config._attn_implementation = "flash_attention_2"
    driver = Driver(manager_of(model))
    for name, length in enumerate((1, 20, 9)):
        driver.add(str(name), tokens(name, 1, length)[0].tolist(), 60)
    texts = driver.finish()
    model.config._attn_implementation = "sdpa"
    assert len(texts) == 3
    assert max(driver.error(name, RULE) for name in texts) < EXACT


def _pairs(ends: Tensor) -> list[tuple[int, int]]:
    """Return where each request begins and ends."""
    return [*zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def test_an_id_in_use_is_refused() -> None:
    """While its request waits or runs; afterwards it is free."""
    driver = Driver(manager_of(ModelSpec().model()))
    driver.add("a", [1, 2, 3], 5)
    for _ in range(3):  # it is queued, then it runs
        with pytest.raises(ValueError, match="request_id='a' is that of a request that has not ended"):
            driver.add("a", [4, 5], 5)
        driver.step()
    driver.finish()
    driver.add("a", [4, 5], 5)
    assert driver.finish()["a"][:2] == [4, 5]


def test_an_id_is_in_use_until_every_sequence_has_ended() -> None:
    """Whichever of them ends first; and a sequence's id is not for another request."""
    manager = manager_of(ModelSpec().model(), sample=True)
    manager.num_return_sequences = 2
    driver = Driver(manager)
    driver.add("a", [1, 2, 3], 30)
    for _ in range(6):
        driver.step()
    manager.cancel_request("a")
    driver.step()
    assert [*driver.processor.scheduler.active_requests] == ["a__child#0"]
    for name in ("a", "a__child#0", "a__child#1"):
        with pytest.raises(ValueError, match=f"request_id='{name}' is that of a request that has not ended"):
            driver.add(name, [4, 5, 6], 30)
    assert set(driver.finish()) == {"a__child#0"}
    driver.add("a", [4, 5, 6], 30)
    assert set(driver.finish()) == {"a", "a__child#0"}
    driver.processor.cache.pool.try_to_free_sectors()
    assert driver.processor.cache.compute_free_capacity() == 1.0


def test_an_automatic_id_is_none_in_use() -> None:
    """Requests with given ids may have those that come next, in the queue or running, or that of a sequence."""
    manager = manager_of(ModelSpec().model())
    driver = Driver(manager)
    driver.add("req_0", [1, 2, 3], 20)
    driver.step()
    driver.add("req_1__child#0", [4, 5], 20)
    assert manager.add_request([6, 7, 8, 9]) == "req_2"
    assert {name: text[0] for name, text in driver.finish().items()} == {"req_0": 1, "req_1__child#0": 4, "req_2": 6}


def test_an_id_is_in_use_on_its_way_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread takes requests from the queue first, and may pause before the scheduler has them."""
    manager = manager_of(ModelSpec().model())
    driver = Driver(manager)
    driver.add("a", [1, 2, 3], 5)
    check, asked = manager.logit_processor.check_kwargs, list[str]()

    def checked(options: Any) -> None:
        assert manager.input_queue.empty()
        with pytest.raises(ValueError, match="request_id='a' is that of") as refused:
            manager.add_request([4], "a")
        asked.append(str(refused.value))
        check(options)

    monkeypatch.setattr(manager.logit_processor, "check_kwargs", checked)
    assert set(driver.finish()) == {"a"}
    assert asked


def test_an_id_that_was_not_queued_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that stays full refuses the request, not its id."""
    manager = manager_of(ModelSpec().model(), max_queue_size=1)
    driver = Driver(manager)
    driver.add("a", [1, 2, 3], 5)
    put = manager.input_queue.put
    monkeypatch.setattr(manager.input_queue, "put", lambda state, **_: put(state, block=False))
    with pytest.raises(queue.Full):
        driver.add("b", [4, 5], 5)
    driver.step()
    driver.add("b", [4, 5], 5)
    assert set(driver.finish()) == {"a", "b"}


def test_a_second_user_cannot_stop_it_under_the_first() -> None:
    """`generate_batch` starts and stops the manager that it finds: a second one at the same time is refused."""
    model: Any = fresh_model(ModelSpec())
    with manager_of(model).serving() as manager:
        manager.start()
        with pytest.raises(RuntimeError, match="runs already, for another caller"):
            model.generate_batch([[1, 2, 3]], max_new_tokens=5)
        assert manager.is_running()
        request = manager.add_request([1, 2, 3], max_new_tokens=5)
        assert next(output for output in manager).request_id == request


@pytest.mark.parametrize("left", ["refused", "interrupted", "unread", "queued"])
def test_a_batch_is_complete_whatever_was_left(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate_batch` counts outputs: it gets those of its own prompts, and no request of the time before."""
    model: Any = fresh_model(ModelSpec())
    manager = manager_of(model)
    with manager.serving():
        if left == "refused":
            assert model.generate_batch([[1, 2, 3], []], max_new_tokens=5) == {}
        elif left == "interrupted":
            with monkeypatch.context() as patch:
                patch.setattr(manager, "get_result", Mock(side_effect=KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=5)
        elif left == "unread":
            manager.start()
            manager.add_requests([[1, 2, 3], [4, 5]], max_new_tokens=5)
            manager.stop()
        else:  # between the last look of the thread and its end
            manager.input_queue.put(RequestState("late", [1, 2, 3], max_new_tokens=5))
        outputs = model.generate_batch([[4, 5], [6, 7]], max_new_tokens=6)
    assert [one.prompt_ids for one in outputs.values()] == [[4, 5], [6, 7]]
    assert [len(one.generated_tokens) for one in outputs.values()] == [6, 6]


def test_prompts_are_queued_together_or_not_at_all() -> None:
    """One that is refused leaves nothing of the others."""
    manager = manager_of(ModelSpec().model())
    driver = Driver(manager)
    for prompts in ([[1, 2, 3], [4, 99]], [[1, 2, 3], 4]):
        with pytest.raises((TypeError, ValueError), match="input_ids"):
            manager.add_requests(cast("Any", prompts), max_new_tokens=5)
    assert manager.input_queue.empty()
    names = manager.add_requests([[1, 2, 3], [4, 5]], max_new_tokens=5)
    assert [driver.finish()[name][0] for name in names] == [1, 4]


def test_a_cancellation_ends_with_its_session() -> None:
    """A request of the next one may have the same id."""
    manager = manager_of(fresh_model(ModelSpec()))
    manager.cancel_request("a")
    manager.start()
    manager.add_request([1, 2, 3], "a", max_new_tokens=5)
    manager.stop()
    assert cast("Any", manager.get_result()).request_id == "a"


def test_a_manager_that_does_not_run_takes_no_requests() -> None:
    """Before it starts and after it has stopped, nothing would read them; afterwards it takes the same id."""
    manager = manager_of(fresh_model(ModelSpec()))
    with pytest.raises(RuntimeError, match=r"was not started.*call start\(\)"):
        manager.add_request([1, 2, 3], "a", max_new_tokens=5)
    for _ in range(2):
        manager.start()
        manager.add_request([1, 2, 3], "a", max_new_tokens=5)
        manager.stop()
        with pytest.raises(RuntimeError, match=r"is stopping.*call start\(\)"):
            manager.add_requests([[1, 2, 3]], max_new_tokens=5)


def test_the_model_waits_for_as_many_as_there_will_be() -> None:
    """`generate_batch` counts by the model's own configuration."""
    model = fresh_model(ModelSpec())
    manager = manager_of(model, sample=True)
    manager.num_return_sequences = 3
    with pytest.raises(ValueError, match="num_return_sequences is 3 here and 1 in the model's"), manager.serving():
        pass
    cast("Any", model.generation_config).num_return_sequences = 3
    with manager.serving():
        assert len(cast("Any", model).generate_batch([[1, 2, 3]], max_new_tokens=5)) == 3


def test_a_model_without_a_head_is_refused() -> None:
    """It gives no logits."""
    decoder = cast("Any", fresh_model(ModelSpec())).model
    with pytest.raises(ValueError, match=r"has no head that gives logits.*use the model around it"):
        manager_of(decoder)


def test_an_attention_that_has_become_eager_is_refused() -> None:
    """It would make weights in float32: seen when the manager starts."""
    model = fresh_model(ModelSpec())
    manager = manager_of(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'attends eagerly.*set_attn_implementation\("sdpa"\)'):
        Driver(manager)


def test_errors_are_of_logits() -> None:
    """Of every token that a request generates, one row is compared with the reference."""
    driver = Driver(manager_of(ModelSpec().model()))
    driver.add("a", [1, 2, 3], 20)
    driver.finish()
    assert len(driver.logits["a"]) == 20
    assert worst(driver.logits["a"][4]) > 0
