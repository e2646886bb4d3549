"""Whatever is done to a cache, in whatever order, it is in lock-step with the reference.

The model of the state is dull: for each row the calls it was fed, each a list of tokens with None for padding. From
that the reference says everything. `nox -s nightly` runs 2,000 machines of up to 30 steps, the default session a few.
"""

from __future__ import annotations

import copy
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sinkwindow.model.versions import CONTINUES_IN_PARTS, TAKES_NEW_TOKENS_ALONE
from sinkwindow_reference import RetainedList, reference_logits, retained_after
from strategies import BOTH, CACHE_NAME, EXACT, ModelSpec, Rule, call, rules, seeds, tokens, worst

if TYPE_CHECKING:
    from sinkwindow import Snapshot, StreamingCache

SPECS: Final = (
    ModelSpec(max_positions=24),  # rebases often
    ModelSpec(family="gpt_neox", head_dim=16, kv_heads=2, rotary_fraction=0.5, max_positions=40),
)
CHUNKS: Final = [None, 2] if CONTINUES_IN_PARTS else [None]
MAX_ROWS: Final = 4
OTHER: Final = Rule(1, 4, 2)  # of another cache of the model
FLOAT32: Final = 1e-5  # `generate` hands logits out in float32
Row = list[list[int | None]]  # calls of tokens


class Feeding(RuleBasedStateMachine):
    """Calls with padding or without, rows that trade places, a past that is recorded, and the way back.

    After each rule everything observable is compared.
    """

    @initialize(spec=st.sampled_from(SPECS), sizes=rules(BOTH), rows=st.integers(1, 3), static=st.booleans())
    def begin(self, spec: ModelSpec, sizes: Rule, rows: int, *, static: bool) -> None:
        """Start with a fresh cache."""
        self.model, self.sizes = spec.model(), sizes
        self.cache: StreamingCache = sizes.cache(self.model, static=static and sizes.evict == "token")
        self.rows: list[Row] = [[] for _ in range(rows)]
        self.snapshots: list[tuple[Snapshot, list[Row]]] = []

    # -- what the model of the state says ---------------------------------------------------------------------------

    def fed(self) -> torch.Tensor:
        """Return the mask of all columns so far, `[rows, columns]`."""
        return torch.tensor([[int(one is not None) for part in row for one in part] for row in self.rows]).long()

    def columns(self) -> int:
        """Count the columns fed, which all rows share."""
        return sum(map(len, self.rows[0]))

    def real(self, row: Row) -> tuple[list[int], list[int]]:
        """Return a row's tokens, and how many came in each call that had any."""
        kept = [[token for token in call if token is not None] for call in row]
        return [token for call in kept for token in call], [len(call) for call in kept if call]

    def evictions(self, row: Row) -> int:
        """Count the evictions that the list program makes of a row's calls."""
        sizes = self.sizes.arguments
        program, count = RetainedList(sizes["num_sinks"], sizes["window"], sizes["buffer"]), 0
        for length in self.real(row)[1]:
            for place in range(length):
                program.append(place)
                if self.sizes.evict == "token" or place == length - 1:
                    count += bool(program.evict_if_full())
        return count

    def check_logits(self, logits: torch.Tensor, mask: torch.Tensor, bound: float = EXACT) -> None:
        """Compare the newest call, `[rows, columns, vocab]`, with the reference."""
        assert bool(logits.isfinite().all())
        for index, row in enumerate(self.rows):
            ids, calls = self.real(row)
            fresh = int(mask[index].sum())
            if fresh:
                expected = reference_logits(self.model, torch.tensor([ids]), chunks=calls, **self.sizes.arguments)
                assert worst(logits[index, -fresh:] - expected[0, -fresh:]) < bound

    # -- feeding ------------------------------------------------------------------------------------------------------

    @rule(seed=seeds(), length=st.integers(1, 30), padded=st.booleans())
    def forward(self, seed: int, length: int, *, padded: bool) -> None:
        """Call the model, perhaps with padding on the left of some rows."""
        ids = tokens(seed, len(self.rows), length)
        mask = torch.ones_like(ids)
        if padded:
            pads = torch.randint(0, length, (len(ids),), generator=torch.Generator().manual_seed(seed))
            mask[torch.arange(length) < pads[:, None]] = 0
        with torch.no_grad():
            arguments: dict[str, Any] = {"attention_mask": mask if padded else None, CACHE_NAME: self.cache}
            logits = self.model(input_ids=ids, **arguments).logits
        for row, row_ids, row_mask in zip(self.rows, ids.tolist(), mask.tolist(), strict=True):
            row.append([token if real else None for token, real in zip(row_ids, row_mask, strict=True)])
        self.check_logits(logits, mask)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def choose(self, chosen: list[int]) -> None:
        """Let row i of the model go on from row chosen[i]."""
        self.rows = [copy.deepcopy(self.rows[index]) for index in chosen]

    @precondition(lambda self: self.columns() > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Permute rows, with repetition, as beams do."""
        count = len(self.rows)
        chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        self.cache.reorder_cache(torch.tensor(chosen))
        self.choose(chosen)

    # -- going back ---------------------------------------------------------------------------------------------------

    @rule(columns=st.integers(0, 12))
    def crop(self, columns: int) -> None:
        """Take the newest columns back if `can_crop` says so; it is an error without consequences otherwise."""
        columns = min(columns, self.columns())
        if not self.cache.can_crop(columns):
            with pytest.raises(ValueError, match="cannot be taken back"):
                self.cache.crop(-columns)
            return
        self.cache.crop(-columns)
        for row in self.rows:
            _drop(row, columns)

    @rule()
    def record(self) -> None:
        """Ask to keep what is evicted."""
        self.cache.activate_past_recording()

    # -- what must always hold ----------------------------------------------------------------------------------------

    @invariant()
    def observable_state_is_the_reference_s(self) -> None:
        """Retained tokens, counts and columns, row by row."""
        assert self.cache.get_seq_length() == self.columns()
        if self.cache.batch_size < 0:
            assert (self.cache.seen_tokens, self.cache.retained_tokens, self.columns()) == ([0], [[]], 0)
            return
        assert self.cache.batch_size == len(self.rows)
        assert self.cache.num_evictions == sum(map(self.evictions, self.rows))
        for index, row in enumerate(self.rows):
            ids, calls = self.real(row)
            retained = retained_after(len(ids), chunks=calls, **self.sizes.arguments) if ids else []
            assert self.cache.retained_tokens[index] == retained
            assert self.cache.seen_tokens[index] == len(ids)


class Streams(Feeding):
    """All the other public operations, too."""

    # -- feeding ------------------------------------------------------------------------------------------------------

    @precondition(lambda _: TAKES_NEW_TOKENS_ALONE)
    @rule(seed=seeds(), prompt=st.integers(1, 6), new=st.integers(1, 4), chunk=st.sampled_from(CHUNKS))
    def generate(self, seed: int, prompt: int, new: int, chunk: int | None) -> None:
        """Continue greedily by `generate`, given only new tokens; each is the likeliest that the reference knows."""
        ids = tokens(seed, len(self.rows), prompt)
        arguments: dict[str, Any] = {
            "attention_mask": torch.cat([self.fed(), torch.ones_like(ids)], dim=1),
            "max_new_tokens": new,
            "do_sample": False,
            "prefill_chunk_size": chunk,
            "return_dict_in_generate": True,
            "output_logits": True,
            CACHE_NAME: self.cache,
        }
        output = self.model.generate(ids, **arguments)  # type: ignore[operator]  # a mixin's method to mypy
        fed, lengths = output.sequences[:, :-1].tolist(), _prefill(prompt, chunk) + [1] * (new - 1)
        for row, row_ids in zip(self.rows, fed, strict=True):
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            row.extend(row_ids[end - length : end] for end, length in zip(ends, lengths, strict=True))
        self.check_logits(torch.stack(output.logits, dim=1)[:, -1:], torch.ones(len(ids), 1), FLOAT32)
        assert torch.equal(torch.stack(output.logits, dim=1).argmax(-1), output.sequences[:, prompt:])

    @precondition(lambda self: self.columns() > 0)
    @rule(seed=seeds(), length=st.integers(1, 20), place=st.integers(0, 2))
    def fail(self, seed: int, length: int, place: int) -> None:
        """Interrupt a call before a layer, or before the head: it has not happened."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        handle = self.modules()[place].register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                self.model(input_ids=tokens(seed, len(self.rows), length), **{CACHE_NAME: self.cache})
        finally:
            handle.remove()

    @rule(seed=seeds(), length=st.integers(1, 30), place=st.integers(0, 2), thread=st.booleans(), data=st.data())
    def forward_with_company(self, seed: int, length: int, place: int, data: st.DataObject, *, thread: bool) -> None:
        """Call the model; in the middle of it another cache, or none, is fed: nested in it, or in another thread."""
        others, kind = tokens(seed + 1, 1, 20), data.draw(st.sampled_from(["streaming", "static", "plain", "itself"]))
        found: list[torch.Tensor | type[Exception]] = []

        def other() -> None:
            handle.remove()
            cache = {"plain": None, "itself": self.cache}.get(kind, OTHER.cache(self.model, static=kind == "static"))
            try:
                found.append(call(self.model, cache, others))
            except RuntimeError:
                found.append(RuntimeError)

        def hook(*_: object) -> None:
            if thread:
                company = threading.Thread(target=other)
                company.start()
                company.join()
            else:
                other()

        handle = self.modules()[place].register_forward_pre_hook(hook)
        self.forward(seed, length, padded=False)
        if kind == "itself":
            assert found == [RuntimeError]
        else:
            sizes = {"num_sinks": 0, "window": 100} if kind == "plain" else OTHER.arguments
            (logits,) = found
            assert isinstance(logits, torch.Tensor)
            assert worst(logits - reference_logits(self.model, others, **sizes)) < (1e-3 if kind == "plain" else EXACT)

    def modules(self) -> list[torch.nn.Module]:
        """Return the layers and the head."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # not typed in transformers
        return [*self.model.base_model.layers, head]  # type: ignore[misc]  # a module to mypy

    # -- rows ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.columns() > 0 and 2 * len(self.rows) <= MAX_ROWS)
    @rule()
    def repeat(self) -> None:
        """Double every row."""
        self.cache.batch_repeat_interleave(2)
        self.choose([index for index in range(len(self.rows)) for _ in range(2)])

    @precondition(lambda self: self.columns() > 0 and len(self.rows) > 1)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Drop rows."""
        chosen = sorted(data.draw(st.sets(st.integers(0, len(self.rows) - 1), min_size=1)))
        self.cache.batch_select_indices(torch.tensor(chosen))
        self.choose(chosen)

    # -- going back ---------------------------------------------------------------------------------------------------

    @rule()
    def snapshot(self) -> None:
        """Copy the content."""
        self.snapshots.append((self.cache.snapshot(), copy.deepcopy(self.rows)))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Go back to any snapshot, any number of times."""
        snapshot, rows = data.draw(st.sampled_from(self.snapshots))
        self.cache.restore(snapshot)
        self.rows = copy.deepcopy(rows)

    @rule()
    def copy(self) -> None:
        """Go on with a deep copy."""
        self.cache = copy.deepcopy(self.cache)

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        """Forget everything: any batch size may follow."""
        self.cache.reset()
        self.rows = [[] for _ in range(rows)]


def _prefill(prompt: int, chunk: int | None) -> list[int]:
    """Return the lengths of the calls in which `generate` feeds a prompt."""
    size = chunk or prompt
    return [min(size, prompt - start) for start in range(0, prompt, size)]


def _drop(row: Row, columns: int) -> None:
    """Take the newest columns off a row."""
    while columns:
        taken = min(columns, len(row[-1]))
        row[-1] = row[-1][: len(row[-1]) - taken]
        columns -= taken
        if not row[-1]:
            row.pop()


# Fewer operations and fewer steps go there and back more often: where padding, record and roll-back meet, faults hid.
EXAMPLES: Final = 2_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 40
Feeding.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=12)
Streams.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30)
TestFeeding = Feeding.TestCase
TestStreams = Streams.TestCase


def test_a_cache_that_dies_in_a_call_of_another_takes_nothing_along() -> None:
    """The garbage collector may take a cache at any time, also while another cache of the same model is in a call."""
    sizes, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(0, 1, 60)
    others, cache = [sizes.cache(model)], sizes.cache(model)
    layers: Any = model.base_model.layers
    handle = layers[1].register_forward_pre_hook(lambda *_: others.clear())
    try:
        logits = call(model, cache, ids)
    finally:
        handle.remove()
    assert worst(logits - reference_logits(model, ids, **sizes.arguments)) < EXACT
