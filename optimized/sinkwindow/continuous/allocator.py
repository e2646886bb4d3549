"""Where the tokens of each request are in a paged cache, and how many it may be fed at once.

A request has S pinned slots, and a ring of R for the others, where R is the first multiple of B + 1 from W + B + 1 on::

    slots   0 ..... S | S ........................ S + R
            (sinks)   | token t at S + (t - S) mod R

Keys stay where and as they were written, at natural positions. The sinks are rotated when they are read, forward by the
number of evicted tokens, which puts them just before the window as the rule has it. Positions stay bounded: a request
that has run far is rebased by a multiple of R: its window keys are rotated back once. Since R is a multiple of
B + 1, the number of tokens since the last eviction and every slot stay what they were, so that all of it follows from
one number per request, the count that transformers keeps anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
from typing_extensions import override

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.requests import RequestState

    from sinkwindow.model.families import ModelFacts
    from sinkwindow.retention import Retention


def ring_of(rule: Retention) -> int:
    """Return R, a multiple of B + 1 that holds W + B + 1 tokens."""
    step = rule.buffer + 1
    return -(-(rule.window + step) // step) * step


class SinkWindowAllocator(FullAttentionCacheAllocator):
    """Where the tokens of each request are, under the rule.

    Args:
        cache: The paged cache; its tensor and its free blocks are taken over.
        rule: The rule, which evicts token by token.
        facts: What is known of the model.

    Attributes:
        ring: R, slots of a request for tokens that are no sinks.
        bound: Positions stay below it.
    """

    supports_block_sharing = False
    supports_block_table = False

    def __init__(self, cache: PagedAttentionCache, rule: Retention, facts: ModelFacts) -> None:
        (stock,) = cast("list[FullAttentionCacheAllocator]", list(cache.cache_allocators.values()))
        super().__init__(
            index=stock.index,
            config=cache.config,
            num_key_value_heads=stock.num_key_value_heads,
            cache_dtype=stock.cache_dtype,
            page_size=stock.tokens_per_page,
            layer_indices=stock.layer_indices,
            allow_block_sharing=False,
        )
        self.rule, self.rotary, self.ring = rule, facts.kinds[0].rotary, ring_of(rule)
        self.bound = max(facts.trained_length or 0, 4 * (rule.num_sinks + self.ring))
        data = cache.num_sectors * cache.bytes_per_sector
        self.register_cache_tensor(cache.bytes_per_sector, data, cache.cache_tensor, cache.pool)
        self._slots: dict[str, tuple[list[int], list[int]]] = {}
        self.begin_batch()

    def begin_batch(self) -> None:
        """Forget which sinks the last batch has read."""
        self._read = 0
        self._sinks: list[int] = []  # where they are among the keys that the batch reads
        self._turns: list[int] = []  # by how many positions each is rotated
        self._rotation: tuple[Tensor, Tensor, Tensor] | None = None  # where they are, cosines, sines: for all layers

    def room(self, seen: int) -> int:
        """Return how many more tokens a request can be fed in one call: up to the one after which it evicts."""
        return self.rule.capacity - (seen - self.rule.evicted_before(seen))

    def rebase(self, request_id: str, seen: int, distance: int) -> None:
        """Rotate the window keys of a request, which has seen so many tokens, back by a multiple of R positions."""
        first = self.rule.first(self.rule.evicted_before(seen))
        index = torch.tensor(self._of_tokens(request_id, first, seen), device=self.cache_tensor.device)
        for keys, _ in self._kv_token_views.values():
            rows = keys[index].transpose(0, 1)  # [kv_heads, tokens, head_dim]
            keys[index] = self.rotary.rotate_by(rows, -distance).transpose(0, 1)

    def _of_tokens(self, request_id: str, start: int, end: int) -> list[int]:
        """Return where the tokens ``[start, end)`` of a request are in the tensor, no more than S + R of them."""
        slots, sinks = self._slots_of(request_id), self.rule.num_sinks
        pinned = slots[start : min(end, sinks)]
        start = max(start, sinks)
        if end <= start:
            return pinned
        begin = sinks + (start - sinks) % self.ring
        over = begin + end - start - (sinks + self.ring)
        if over <= 0:
            return pinned + slots[begin : begin + end - start]
        return pinned + slots[begin : sinks + self.ring] + slots[sinks : sinks + over]

    def _slots_of(self, request_id: str) -> list[int]:
        blocks = self.block_table[request_id]
        known = self._slots.get(request_id)
        if known is None or known[0] != blocks:
            pages = [block * self.block_physical_stride for block in blocks]
            known = [*blocks], [row for page in pages for row in range(page, page + self.tokens_per_page)]
            self._slots[request_id] = known
        return known[1]

    # -- what transformers asks ---------------------------------------------------------------------------------------

    @override
    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        longest = self.rule.num_sinks + self.ring
        held = min(past_length + query_length, longest)
        needed: int = super()._compute_blocks_needed(allocated_blocks, 0, held)
        return needed

    @override
    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Return the blocks of a request to the pool."""
        self._slots.pop(request_id, None)
        super().free_blocks(request_id, no_cache)

    @override
    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Return how many keys a request's call attends to, its own included."""
        return past_length - self.rule.evicted_before(past_length) + query_length

    @override
    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Return where the keys are that a request's call attends to, its own included: sinks first."""
        evicted, where = self.rule.evicted_before(past_length), []
        if evicted:
            where = self._of_tokens(request_id, 0, self.rule.num_sinks)
            self._sinks += range(self._read, self._read + len(where))
            self._turns += [evicted] * len(where)
        start = self.rule.first(evicted) if evicted else 0
        where += self._of_tokens(request_id, start, past_length + query_length)
        self._read += len(where)
        return where

    @override
    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Return where a request's call writes its keys."""
        return self._of_tokens(request_id, past_length, past_length + query_length)

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, read_index: Tensor, write_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values, and return all that the batch attends to, its sinks rotated.

        Args:
            key_states: ``[tokens, kv_heads, head_dim]``.
            value_states: Likewise.
            layer_idx: The layer.
            read_index: What ``get_read_indices`` gave for the requests of the batch, in order.
            write_index: What ``get_write_indices`` gave.

        Returns:
            Keys and values, ``[read, kv_heads, head_dim]``.
        """
        keys, values = super().update(key_states, value_states, layer_idx, read_index, write_index)
        if self._sinks and read_index.numel():
            if self._rotation is None:
                turns = torch.tensor(self._turns)[:, None]  # [sinks, 1], the same for all heads
                tables = self.rotary.cos_sin(turns, keys.device, keys.dtype)
                self._rotation = torch.tensor(self._sinks, device=keys.device), *tables
            index, cos, sin = self._rotation
            keys[index] = self.rotary.rotate(keys[index], cos, sin)
        return keys, values


class SinkWindowScheduler(FIFOScheduler):
    """First come, first served; no call goes past the token after which the request evicts.

    Args:
        allocator: The allocator of the cache.
        stock: The scheduler whose place it takes.
        queued: Ids of requests on their way to it, which it removes when it has them.
    """

    def __init__(self, allocator: SinkWindowAllocator, stock: FIFOScheduler, queued: set[str]) -> None:
        self.allocator, self.queued = allocator, queued
        super().__init__(stock.cache, stock.safety_margin, stock.max_requests_per_batch)

    @override
    def add_waiting_request(self, state: RequestState) -> None:
        """Take over a request; its id is in one place or the other at any time."""
        super().add_waiting_request(state)
        self.queued.discard(state.request_id)

    @override
    def clear_cancelled_requests(self) -> list[RequestState]:
        """Remove cancelled requests, and admit others in their place: transformers does so only when a request ends."""
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled

    @override
    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Choose the requests of the next batch, and rebase those whose positions near the bound."""
        self.allocator.begin_batch()
        for state in self.active_requests.values():
            # Two calls fit below the bound: a request that is pre-empted after one is not seen here before its next.
            far = state.position_offset + 2 * self.allocator.rule.capacity - self.allocator.bound
            if far > 0:
                distance = -(-far // self.allocator.ring) * self.allocator.ring
                self.allocator.rebase(state.request_id, state.position_offset, distance)
                state.position_offset -= distance
        return super().schedule_batch(token_budget, cache_budget)

    @override
    def _schedule_request(
        self,
        state: RequestState,
        request_tokens: list[int],
        token_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> None:
        budget = min(token_budget, self.allocator.room(state.position_offset))
        super()._schedule_request(state, request_tokens, budget, request_ids_to_remove_from_waiting)
