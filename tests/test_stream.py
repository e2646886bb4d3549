"""A stream without a model: each query is given the keys and values of its list, at their ranks.

A token's value is its number, so that what a layer returns can be read. Its key is a random vector that is rotated to
the position that the stream asks for; a query must then meet each key of its list at the distance of their ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow import Retention
from sinkwindow.attention.rotation import Rotary
from sinkwindow.lanes import Inputs
from sinkwindow.storage.slots import Pool
from sinkwindow.stream.history import _counts_at, _shortened
from sinkwindow.stream.steps import Steps
from sinkwindow.stream.stream import Stream
from sinkwindow_reference import RetainedList
from strategies import BOTH, Rule, budget, rules, seeds

if TYPE_CHECKING:
    from torch import Tensor

    from sinkwindow.stream.call import StreamCall
    from sinkwindow.stream.state import State

CPU = torch.device("cpu")
META = torch.device("meta")  # the default device of all that the stream does: it holds no values to go on with
LAYERS = ((3, 5), (4,))  # of two pools: the second one has a window of its own, and no sinks
ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.07], dtype=torch.float64))
KEYS = torch.randn(6, 20_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Row = list[list[int | None]]  # call by call the number of each column's token, None for padding


@dataclass
class Program:
    """The list program run over a row: what each query of the last call attends to, what is kept, what left."""

    rule: Rule
    row: Row
    lists: list[list[int]] = field(default_factory=list)
    evicted: list[list[int]] = field(default_factory=list)
    evictions: int = 0

    def __post_init__(self) -> None:
        """Append and evict, token by token or call by call."""
        program, self.seen = RetainedList(self.rule.num_sinks, self.rule.window, self.rule.buffer), 0
        for call in self.row:
            self.lists, self.evicted = [], []
            for _ in (number for number in call if number is not None):
                program.append(self.seen)
                self.lists.append(list(program.tokens))
                self.seen += 1
                if self.rule.evict == "token":
                    self._count(program.evict_if_full())
            self._count(program.evict_if_full())
        self.kept = program.tokens
        self.numbers = [number for call in self.row for number in call if number is not None]

    def _count(self, gone: list[int]) -> None:
        if gone:
            self.evicted.append(gone)
            self.evictions += 1


class Twin:
    """A stream and what was fed to each of its rows."""

    def __init__(self, rule: Rule, seed: int, *, static: bool, ranked: bool) -> None:
        self.ranked, self.random = ranked, random.Random(seed)  # noqa: S311 - no secret
        self.rules = rule, Rule(0, self.random.randint(1, 9))
        pools = [
            Pool(Retention(**one.arguments), ROTARY, layers, ranked, static)
            for one, layers in zip(self.rules, LAYERS, strict=True)
        ]
        self.stream = Stream(pools, 10**6 if static or not ranked else rule.capacity + 9)
        self.steps = Steps(self.stream, ["full_attention", "sliding_attention"])
        self.rows: list[Row] = [[] for _ in range(self.random.randint(1, 3))]
        self.number = 0

    def programs(self, rows: list[Row]) -> list[list[Program]]:
        """Return what each pool's rule makes of each row."""
        return [[Program(rule, row) for row in rows] for rule in self.rules]

    # -- calls --------------------------------------------------------------------------------------------------------

    def extend(self, columns: int, *, padded: bool = False) -> list[list[int]]:
        """Give each row new columns, and return which hold tokens."""
        for row in self.rows:
            share = self.random.random() if padded else 1
            real = [self.random.random() < share for _ in range(columns)]
            row.append([self.number + column if is_real else None for column, is_real in enumerate(real)])
            self.number += columns
        return [[column for column, number in enumerate(row[-1]) if number is not None] for row in self.rows]

    def fresh(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of the newest columns."""
        numbers = torch.tensor([[number or 0 for number in row[-1]] for row in self.rows])
        keys = ROTARY.rotate_by(KEYS[layer, numbers][:, None], positions[:, None])
        return keys, numbers[:, None, :, None].double() + layer

    def feed(self, stream: Stream, columns: int, *, padded: bool = False, aside: bool = False) -> StreamCall:
        """Run a call of all layers and check what each query is given."""
        places = self.extend(columns, padded=padded)
        with META:
            call = stream.begin(Inputs(len(self.rows), columns, CPU, [*places] if padded else None), aside=aside)
            positions, masks = call.positions(CPU).expand(len(self.rows), -1), call.masks(CPU)
        assert -columns < int(positions.min()) <= int(positions.max()) < self.stream.bound
        for index, (part, programs) in enumerate(zip(call.parts, self.programs(self.rows), strict=True)):
            mask = masks[index] if masks else torch.ones(1, 1, columns, part.front + columns).tril(part.front)
            for layer in LAYERS[index]:
                fresh = self.fresh(layer, positions)
                with META:
                    found = part.update(layer, *fresh)
                self.check(layer, programs, positions.tolist(), mask.bool(), *found)
        return call

    def step(self) -> None:
        """Run a step of a static stream and check what each query is given."""
        eager = self.random.random() < 0.5
        self.extend(1)
        ids, embedded = torch.zeros(len(self.rows), 1), torch.zeros(len(self.rows), 1, 4)
        tokens = {"input_ids": ids} if self.random.random() < 0.5 else {"input_ids": None, "inputs_embeds": embedded}
        with META:
            self.steps.follow()
            begun: dict[str, Any] = self.steps.begin(tokens, "eager" if eager else "sdpa")
        positions, programs = begun["position_ids"].long(), self.programs(self.rows)
        for index, (name, mask) in enumerate(begun["attention_mask"].items()):
            assert name == ["full_attention", "sliding_attention"][index]
            assert mask.dtype == (torch.float64 if eager else torch.bool)
            for layer in LAYERS[index]:
                fresh = self.fresh(layer, positions)
                with META:
                    found = self.steps.update(layer, *fresh)
                self.check(layer, programs[index], positions.tolist(), mask == 0 if eager else mask, *found)
        with META:
            self.steps.commit()
            self.steps.sync()

    def check(self, layer: int, programs: list[Program], at: list[list[int]], mask: Tensor, *found: Tensor) -> None:
        """Compare what each query is given, whose positions are ``at``, with its list."""
        keys, values = found
        assert keys.isfinite().all()
        assert values.isfinite().all()  # also where a mask hides them
        numbers, masks = (values[:, 0, :, 0].long() - layer).tolist(), mask.expand(len(self.rows), -1, -1, -1).tolist()
        for r, (program, row) in enumerate(zip(programs, self.rows, strict=True)):
            real = [column for column, number in enumerate(row[-1]) if number is not None]
            positions: dict[int, int] = {}  # of what is in each column that some query sees
            for query, kept in zip(real, program.lists, strict=True):
                seen = [column for column, visible in enumerate(masks[r][0][query]) if visible]
                assert sorted(numbers[r][column] for column in seen) == [program.numbers[token] for token in kept]
                places = range(len(kept)) if self.ranked else kept
                behind = {program.numbers[token]: places[-1] - place for token, place in zip(kept, places, strict=True)}
                for column in seen:
                    wanted = at[r][query] - behind[numbers[r][column]]
                    assert positions.setdefault(column, wanted) == wanted
            columns, wanted_at = list(positions), torch.tensor(list(positions.values()))
            if columns:
                raw = KEYS[layer, [numbers[r][column] for column in columns]]
                assert torch.allclose(keys[r, 0, columns], ROTARY.rotate_by(raw, wanted_at), atol=1e-9)

    def commit(self, call: StreamCall) -> None:
        """Count a call and check what it evicted."""
        with META:
            events = sorted((event.row, list(event.tokens)) for event in self.stream.commit(call))
        assert events == [(r, gone) for r, one in enumerate(self.programs(self.rows)[0]) for gone in one.evicted]

    # -- anything -----------------------------------------------------------------------------------------------------

    def crop(self, columns: int) -> None:
        """Take columns back, or be refused and change nothing."""
        with META:
            if self.stream.can_crop(columns):
                self.stream.crop(columns)
                self.rows = [_without(row, columns) for row in self.rows]
            else:
                with pytest.raises(ValueError, match=f"The last {columns} columns cannot be taken back"):
                    self.stream.crop(columns)

    def act(self) -> None:
        """Do something at random."""
        fed = sum(map(len, self.rows[0]))
        match self.random.choice("ffffpppccrsskdottt"):
            case "f":
                self.commit(self.feed(self.stream, self.random.choice([1, 1, 1, 2, 3, 5, 9, 20])))
            case "p":
                self.commit(self.feed(self.stream, self.random.choice([1, 2, 5, 12]), padded=True))
            case "t" if fed and self.stream.static and self.rules[0].evict == "token":
                self.step()
            case "c" if fed:
                self.crop(self.random.randint(1, min(fed, 12)))
            case "r":
                self.stream.record_past()
            case "s" if fed:
                chosen = [self.random.randrange(len(self.rows)) for _ in range(self.random.randint(1, 3))]
                self.stream.select_rows(torch.tensor(chosen))
                self.rows = [[list(call) for call in self.rows[row]] for row in chosen]
            case "k":
                self.stream = self.stream.fork(self.stream.state.cloned())
                self.steps = Steps(self.stream, ["full_attention", "sliding_attention"])
            case "d":
                self.stream.reset()
                self.rows = [[] for _ in range(self.random.randint(1, 3))]
            case "o" if fed and self.rules[0].evict == "token":
                fork = self.stream.fork(self.stream.after(self.feed(self.stream, 3, aside=True))[0])
                fork.commit(self.feed(fork, 7))
                self.stream.adopt(fork.state)

    def observe(self) -> None:
        """Compare what the stream knows, and what it would know some columns ago, with the list program."""
        state = self.stream.state
        assert state.columns == sum(map(len, self.rows[0]))
        if state.batch is not None:
            with META:
                fed = self.stream.tokens_fed(state.batch)
            assert fed.tolist() == [[number is not None for call in row for number in call] for row in self.rows]
        self.compare(state, 0)
        first, second = sorted(self.random.randint(0, state.columns) for _ in range(2))
        self.compare(state, state.columns - second)
        earlier = replace(state, columns=second, past=_shortened(state.past, second))
        self.compare(earlier, second - first)

    def compare(self, state: State, columns: int) -> None:
        """Compare counts some columns before a state with the list program."""
        fed = sum(map(len, self.rows[0])) - state.columns
        rules = self.programs([_without(row, fed + columns) for row in self.rows])
        counts = _counts_at(self.stream.pools, state, state.columns - columns)
        assert counts is not None
        found = [(lane.seen, lane.evictions) for lane in counts.lanes]
        assert found == [(one.seen, one.evictions) for one in rules[0]][: len(state.lanes)]
        gone = tuple(tuple(one.seen - len(one.kept) for one in programs)[: len(state.lanes)] for programs in rules)
        assert counts.evicted == gone
        if not fed and not columns:
            assert tuple(tuple(row.evicted for row in slots.lanes) for slots in state.pools) == gone
            assert state.num_evictions == sum(one.evictions for one in rules[0])


def _without(row: Row, columns: int) -> Row:
    """Return a row whose newest columns were never fed."""
    left, kept = sum(map(len, row)) - columns, []
    for call in row:
        kept.append(call[:left])
        left -= len(kept[-1])
    return [call for call in kept if call]


@budget(2)
@given(rule=rules(BOTH), seed=seeds(), static=st.booleans(), ranked=st.booleans())
def test_each_query_is_given_its_list_at_its_ranks(rule: Rule, seed: int, *, static: bool, ranked: bool) -> None:
    """After any calls, steps, roll-backs, reorderings, copies and resets."""
    twin = Twin(rule, seed, static=static, ranked=ranked or static)
    for _ in range(20):
        twin.act()
        twin.observe()
