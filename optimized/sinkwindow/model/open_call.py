"""A forward call of a cache, from the hook before the module that the user called to the hook after it.

All state of a call is here, and belongs to the cache that runs it; models, configs and other caches know nothing of it.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from sinkwindow.attention.mask import additive
from sinkwindow.model.exact_rope import marked
from sinkwindow.model.pieces import JOINED, PER_CALL, arguments_of, joined, piece_of
from sinkwindow.model.state_layers import STATE_ONLY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from transformers import PreTrainedModel

    from sinkwindow.lanes import Inputs
    from sinkwindow.model.families import ModelFacts
    from sinkwindow.stream.call import PoolCall, StreamCall
    from sinkwindow.stream.events import Eviction
    from sinkwindow.stream.steps import Steps
    from sinkwindow.stream.stream import Stream

ATTENDING_PART = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
MASKED = ("sdpa", "eager", "flex_attention")  # attention implementations that take our 4D masks

_CALL = nn.Module._call_impl.__code__  # noqa: SLF001 - the function that runs a module's forward and its hooks


@dataclass(slots=True, eq=False)
class OpenCall:
    """A call under way.

    A call that was interrupted is never closed: torch runs no hook after a KeyboardInterrupt. Whether one is still
    running is seen on its thread's stack. The frame is known by its address, since holding it would keep all tensors
    of an interrupted call alive.

    Attributes:
        facts: What is known of the model.
        cache: The address of the cache.
        module: The address of the module that the user called.
        frame: The address of the frame in which torch calls it; 0 for a call made by hand.
        thread: The thread.
        stream: Where the call's tokens go: the cache's stream, or a fork of it when the call runs in pieces.
        plan: The piece under way; ``None`` before the decoder begins, and in a step at fixed shapes.
        targets: For each pool what takes a layer's keys and values.
        todo: Layers that have not updated the cache yet.
        outputs: Hidden states of the pieces that have run.
        masked: Whether the model's attention takes 4D masks.
        as_tuple: Whether the decoder's output is to be a tuple.
        evictions: Of the pieces that have run.
        late: Whether a pre-hook of the user's, which may change the arguments, runs after the cache's.
    """

    facts: ModelFacts
    cache: int
    module: int
    frame: int
    thread: int = field(default_factory=threading.get_ident)
    stream: Stream | None = None
    plan: StreamCall | None = None
    targets: Sequence[PoolCall | Steps] = ()
    todo: set[int] = field(default_factory=set)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    masked: bool = True
    as_tuple: bool = False
    evictions: list[Eviction] = field(default_factory=list)
    late: bool = False

    def is_running(self, above: FrameType | None = None) -> bool:
        """Return whether the call's frame is still on its thread's stack, of this one above a frame."""
        frame: FrameType | None
        if self.thread == threading.get_ident():
            frame = above or sys._getframe(1)  # noqa: SLF001 - documented, for exactly this
        else:
            frame = sys._current_frames().get(self.thread)  # noqa: SLF001 - documented, for debuggers
        while frame is not None:
            if id(frame) == self.frame and frame.f_code is _CALL:
                # An address is used again: look also whom the frame calls, and with what.
                names = frame.f_locals
                values = (*names["args"], *names["kwargs"].values())
                if id(names["self"]) == self.module and self.cache in map(id, values):
                    return True
            frame = frame.f_back
        return False

    def is_served(self) -> bool:
        """Return whether layers that hand over keys belong to this call: it is running here, or made by hand."""
        return not self.frame or (self.thread == threading.get_ident() and self.is_running())

    # -- what the decoder is given ------------------------------------------------------------------------------------

    def begin_step(self, steps: Steps, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Begin a step at fixed shapes; return the decoder's arguments, rewritten."""
        self.stream, self.targets = steps.stream, [steps] * len(steps.stream.pools)
        return kwargs | steps.begin(kwargs, decoder.config._attn_implementation)  # noqa: SLF001

    def begin(self, stream: Stream, decoder: PreTrainedModel, kwargs: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
        """Run all pieces of a call but the last, on a fork of the stream, and begin that one.

        Args:
            stream: The cache's stream; what it holds does not change.
            decoder: The model.
            kwargs: Its arguments by name.
            inputs: What they bring.

        Returns:
            The decoder's arguments for the last piece.

        Raises:
            ValueError: The call must run in pieces, and is asked for what pieces do not add up to.
        """
        self.masked = decoder.config._attn_implementation in MASKED and not self.facts.own_attention  # noqa: SLF001
        self.stream = stream
        if inputs.columns > 1 and self.frame:  # by hand, there is nothing to run pieces with
            columns = self._first_piece(stream, decoder, kwargs, inputs)
            if kwargs.get("return_dict", decoder.config.return_dict) is False:
                kwargs, self.as_tuple = kwargs | {"return_dict": True}, True  # the items of a tuple have no names
            if columns < inputs.columns:
                kwargs, inputs = self._run_pieces(stream, columns, decoder, kwargs, inputs)
        return self._plan(decoder, kwargs, inputs)

    def _first_piece(self, stream: Stream, decoder: PreTrainedModel, kwargs: dict[str, Any], inputs: Inputs) -> int:
        """Return how many columns of a call to run at once."""
        length = stream.piece_length(inputs, masked=self.masked)
        if length == inputs.columns:
            return length
        flags = [name for name in PER_CALL if kwargs.get(name) or getattr(decoder.config, name, False)]
        whole = [(f"{name}=True", "leave it out") for name in flags]
        whole += [("a gradient", "call under torch.no_grad()")] if _has_gradient(decoder, kwargs) else []
        # Other hooks of the user's run around all pieces; these see the last one alone.
        whole += [("a global forward hook", "remove it")] if _global_forward_hooks else []
        whole += [("a pre-hook that was registered after the last call", "call again")] if self.late else []
        if not whole:
            return length
        held = stream.pools[0].held(stream.state.pools[0], stream.state.lanes)
        if not self.masked or (stream.longest is not None and held + inputs.columns > stream.longest):
            why = "takes no 4D mask" if not self.masked else "has a table of positions"
            raise ValueError(
                f"{whole[0][0]} needs a call in one piece, and this one must run in pieces, since the attention of "
                f"{type(decoder).__name__} {why}: feed at most {length} columns, or {whole[0][1]}."
            )
        return inputs.columns

    def _run_pieces(
        self, stream: Stream, length: int, decoder: PreTrainedModel, kwargs: dict[str, Any], inputs: Inputs
    ) -> tuple[dict[str, Any], Inputs]:
        """Run all pieces but the last; return the arguments of that one, and what they bring."""
        start, end, todo = 0, inputs.columns, set(self.todo)
        in_slots = stream.has_room(inputs)
        if in_slots:  # evicted tokens stay where a roll-back finds them
            self.stream = stream = stream.fork(stream.state.cloned())
        while start + length < end:
            run, piece = piece_of(inputs, start, start + length), arguments_of(kwargs, start, start + length)
            arguments = self._plan(decoder, piece, run, aside=not start and not in_slots)
            output = decoder.forward(**arguments)
            if output["last_hidden_state"].requires_grad:  # by a tensor of a user's hook
                raise ValueError(
                    f"a gradient needs a call in one piece, and this one runs in pieces of {length} columns: make the "
                    "model's parameters or inputs_embeds require it, feed shorter calls, or use torch.no_grad()."
                )
            self.outputs.append({name: output[name] for name in JOINED if name in output})
            self.check_layers()
            self.todo = set(todo)
            plan = cast("StreamCall", self.plan)
            if start or in_slots:
                self.evictions += stream.commit(plan)
            else:
                state, self.evictions = stream.after(plan)
                self.stream = stream = stream.fork(state)
            start += length
            length = stream.piece_length(piece_of(inputs, start, end), masked=self.masked)
        return arguments_of(kwargs, start, end), piece_of(inputs, start, end)

    def _plan(
        self, decoder: PreTrainedModel, kwargs: dict[str, Any], inputs: Inputs, *, aside: bool = False
    ) -> dict[str, Any]:
        """Plan a piece and return the decoder's arguments for it; ``aside`` leaves the slots alone."""
        facts, stream = self.facts, cast("Stream", self.stream)
        plan = stream.begin(inputs, aside=aside)
        self.plan, self.targets = plan, plan.parts
        positions = plan.positions(inputs.device)
        if kwargs.get("cache_position") is not None:  # of transformers before 5.4: masks count columns from it
            before = plan.parts[0].front
            columns = torch.arange(before, before + inputs.columns, device=inputs.device)
            kwargs = kwargs | {"cache_position": columns}
        return kwargs | {
            "position_ids": marked(
                positions, decoder, plan.reach, stream.capacity, changes=facts.changes, table=facts.has_table
            ),
            "attention_mask": self._mask(plan, decoder, inputs),
        }

    def _mask(
        self, plan: StreamCall, decoder: PreTrainedModel, inputs: Inputs
    ) -> Tensor | Mapping[str, Tensor | None] | None:
        """Return the mask that the model is given: 4D where it takes one, 2D where it makes its own of it.

        Raises:
            ValueError: It needs a 4D mask for each kind of layer, and takes none.
        """
        kinds = self.facts.kinds
        if self.facts.own_attention:
            return plan.columns_with_tokens(inputs.device)
        implementation = decoder.config._attn_implementation  # noqa: SLF001
        if not self.masked:  # nothing crosses an eviction in a piece, and the model knows its own windows
            if plan.is_even():
                return None
            if len({kind.layer_type for kind in kinds}) > 1:
                raise ValueError(
                    f"attn_implementation={implementation!r} takes no 4D mask, which padded rows of a model with "
                    'layers of several kinds need: use "sdpa", or rows without padding.'
                )
            return plan.columns_with_tokens(inputs.device)
        masks = plan.masks(inputs.device)
        if masks is None:
            return None
        if implementation != "sdpa":
            masks = [additive(mask, decoder.dtype).expand(inputs.batch, -1, -1, -1) for mask in masks]
        by_type = {kind.layer_type: mask for kind, mask in zip(kinds, masks, strict=True)}
        if self.facts.states:  # by which names they ask for them depends on the family
            own = {ATTENDING_PART.get(kind, kind): mask for kind, mask in by_type.items()}
            padding = None if plan.plain else plan.columns_with_tokens(inputs.device)[:, -inputs.columns :]
            return {**by_type, **own, **dict.fromkeys(STATE_ONLY, padding)}
        return masks[0] if len(by_type) == 1 else by_type

    def check_layers(self) -> None:
        """Refuse a call in which some layer never handed over its keys; it does not count."""
        if self.todo:
            raise RuntimeError(f"Layers {sorted(self.todo)} did not update the cache in this call; it is undone.")

    # -- what the decoder returns -------------------------------------------------------------------------------------

    def completed(self, output: Any, pool_of: Mapping[int, int]) -> Any:
        """Return the output with those of earlier pieces, and weights of copied sinks in their own columns."""
        if self.outputs:
            output = joined([*self.outputs, output])
        weights = output.get("attentions") if isinstance(output, dict) else None
        if weights and self.plan is not None:  # sdpa returns none
            pools = [pool_of[layer] for layer in sorted(pool_of)]
            types = [kind.layer_type for kind in self.facts.kinds]
            pools += [types.index(kind) for kind in self.facts.borrowers]
            parts = [self.plan.parts[pool] for pool in pools]
            output["attentions"] = tuple(
                weight if weight is None else part.fold(weight) for part, weight in zip(parts, weights, strict=True)
            )
        return output.to_tuple() if self.as_tuple else output


def _has_gradient(decoder: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Return whether a backward pass may follow: cached keys are constants, so pieces would cut it."""
    tensors = (*decoder.parameters(), kwargs.get("inputs_embeds"))
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def module_frame() -> FrameType | None:
    """Return the frame in which torch calls the module whose hook is running, ``None`` outside of hooks."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, for exactly this
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame
