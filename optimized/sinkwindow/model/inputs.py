"""Reading a forward call's arguments: how many columns, which of them hold real tokens, and what is refused.

A cache knows where its tokens are. What a caller says of them a second time (a mask over cached columns, positions) is
compared with that, and refused where the two differ: to ignore it would give wrong logits in silence.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkwindow.attention.step import is_tracing
from sinkwindow.lanes import Inputs
from sinkwindow.model.families import FULL, ModelFacts, config_refusal
from sinkwindow.model.open_call import ATTENDING_PART
from sinkwindow.model.pieces import tokens_of
from sinkwindow.model.state_layers import STATE_ONLY
from sinkwindow.model.versions import RECOMPUTES_FOR_GRADIENTS_ONLY

if TYPE_CHECKING:
    import weakref
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from sinkwindow.model.rope import Frequencies
    from sinkwindow.stream.state import State
    from sinkwindow.stream.stream import Stream

REMEMBERED = " A Qwen-VL model makes them of what its last generate or image has left: set its rope_deltas to None."
ANOTHER_MODEL = "This StreamingCache was made for another model, or is detached; make a new one for the model you call."
HIDDEN = -1e4  # what is added to the scores of a hidden key is this, or less
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that say where each of several packed texts begins


@dataclass(frozen=True, slots=True)
class CallChecks:
    """What a cache accepts in a call.

    Attributes:
        decoder: The module that the cache serves.
        frequencies: The angles of its rotary modules, as they were when the cache was made.
        facts: What is known of it.
        may_evict: Whether tokens may be evicted.
        last_position: The last one that original positions allow; ``None`` where ranks are the positions.
    """

    decoder: weakref.ref[PreTrainedModel]
    frequencies: Sequence[Frequencies]
    facts: ModelFacts
    may_evict: bool
    last_position: int | None

    def read(self, stream: Stream, decoder: PreTrainedModel, kwargs: dict[str, Any], *, attached: bool) -> Inputs:
        """Read a call, before anything changes.

        Raises:
            ValueError: The decoder is another one or has changed; no tokens, another batch size than before, a mask
                that is not a left-padding 2D mask over all columns (or over the new ones) or contradicts what was fed,
                or positions that are not those of the tokens.
            OverflowError: The call goes beyond what the cache may evict, or the positions it may use.
        """
        if decoder is not self.decoder() or not attached:
            raise ValueError(ANOTHER_MODEL)
        for frequencies in self.frequencies:
            if not frequencies.are_unchanged():
                raise ValueError(
                    "The model's rotary frequencies are others than when this StreamingCache was made: a cast like "
                    "model.to(torch.bfloat16) rounds them. Make the cache after the cast."
                )
        check_flags(decoder, kwargs)
        rows, columns, device = _read_tokens(kwargs, stream.state.batch)
        mask = kwargs.get("attention_mask")
        real = None if mask is None else self._read_masks(mask, rows, columns, stream)
        if isinstance(mask, Tensor) and mask.shape[-1] == columns == stream.state.columns:
            _check_is_no_repetition(decoder, columns)
        inputs = Inputs(rows, columns, device, real)
        positions = kwargs.get("position_ids")
        if positions is not None and not _has_no_data(positions):
            by_kind = any(hasattr(one.module(), "mrope_section") for one in self.frequencies)  # M-RoPE
            _check_positions(positions, inputs, stream.state, by_kind=by_kind)
        if self.facts.counts_columns:
            _check_padding_is_leading(inputs, [lane.seen for lane in stream.state.lanes])
        if not self.may_evict or self.last_position is not None:
            self._check_room(stream, inputs)
        return inputs

    def _read_masks(self, given: object, rows: int, columns: int, stream: Stream) -> list[list[int]] | None:
        """Return each row's new columns with tokens, by one mask or by a dict of one for each type of layers."""
        forms: dict[str, tuple[int | None, int]] = {}
        found: list[list[list[int]] | None] = []
        for kind, pool, slots in zip(self.facts.kinds, stream.pools, stream.state.pools, strict=True):
            slots_shown = pool.size(slots, recording=False) if pool.static and slots.banks and columns == 1 else 0
            form = kind.window or self.facts.native_window, slots_shown
            forms |= {kind.layer_type: form, ATTENDING_PART.get(kind.layer_type, kind.layer_type): form}
        first = next(iter(forms))
        masks = given if isinstance(given, dict) else {first: given}
        known = [*forms, *(STATE_ONLY if self.facts.states else ())]
        if not masks or not {first: None, FULL: None, **dict.fromkeys(known)}.keys() >= masks.keys():
            raise ValueError(
                f"attention_mask must be one 2D mask, or a dict of masks for some of the types of layers, {known}; "
                f"got one for {list(masks)}: pass one 2D mask, or none."
            )
        for name, mask in masks.items():
            if mask is None or _has_no_data(mask):
                continue
            window, size = forms.get(name, forms[first])
            read = _checked_form(mask, rows, columns, stream.state.columns, size)
            text = read if read.dim() == 2 else _text_of(read, rows, window, size, stream)  # noqa: PLR2004
            found.append(_read_mask(text, columns, stream))
        if any(real != found[0] for real in found):
            raise ValueError("attention_mask is a dict of masks with padding in different places: pass one 2D mask.")
        return found[0] if found else None

    def _check_room(self, stream: Stream, inputs: Inputs) -> None:
        most, evicts = stream.preview(inputs)
        if not self.may_evict and evicts:
            raise OverflowError(
                f"The call brings {most} tokens and would evict: the cache keeps {stream.rule.limit} plus a "
                f'buffer of {stream.rule.buffer}, and on_overflow is "error". Use a larger window or "evict".'
            )
        if self.last_position is not None and most > self.last_position:
            raise OverflowError(
                f"The call reaches token {most}, beyond the {self.last_position} positions that the model was "
                'trained on: positions="original" goes no further, positions="rank" goes on indefinitely.'
            )


def check_flags(decoder: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse what a stream of tokens contradicts; while a step is traced, by the arguments alone.

    Raises:
        ValueError: Layers would not be given the cache, attention is not causal, or several texts are packed.
    """
    if kwargs.get("use_cache") is False:  # `generate` would feed the whole text again with every token
        raise ValueError(
            "use_cache=False contradicts a cache: pass use_cache=True, also to generate where the model's "
            "generation_config says False, or pass no cache."
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False contradicts a StreamingCache, whose tokens never attend to later ones.")
    for name in PACKED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} packs several texts into a row, and each row of a StreamingCache is one text: "
                "pass one text per row, with a left-padding attention_mask."
            )
    if is_tracing():
        return
    recomputes = decoder.training and (torch.is_grad_enabled() or not RECOMPUTES_FOR_GRADIENTS_ONLY)
    if recomputes and any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        raise ValueError(
            "Gradient checkpointing gives no cache to the layers while the model is in training mode: switch it off, "
            "call model.eval(), or pass no cache."
        )
    if reason := config_refusal(decoder.config):
        raise ValueError(reason)


def _has_no_data(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _read_tokens(kwargs: dict[str, Any], batch: int | None) -> tuple[int, int, torch.device]:
    """Return a call's rows and columns, and the device of its tokens."""
    name = tokens_of(kwargs)
    tokens, floats = kwargs.get(name), name == "inputs_embeds"
    if (
        not isinstance(tokens, Tensor)
        or tokens.dim() != 2 + floats
        or tokens.is_floating_point() != floats
        or tokens.dtype == torch.bool
    ):
        wanted = "[batch, tokens, width] of floats" if floats else "[batch, tokens] of integers"
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be a tensor, {wanted}, got {got}.")
    if 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name} must hold at least one new token per call; the cache has the earlier ones already. For another "
            "text, call reset() first."
        )
    rows, columns = tokens.shape[:2]
    if batch is not None and rows != batch:
        raise ValueError(
            f"{name} has batch size {rows}, but the cache holds {batch} rows; use a fresh cache or reset()."
        )
    return rows, columns, tokens.device


def _check_is_no_repetition(decoder: PreTrainedModel, columns: int) -> None:
    """Refuse what may be the cached text again, as ``generate`` feeds it, where no positions tell it from a new one."""
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        raise ValueError(
            f"attention_mask has the {columns} columns of this call, and as many are cached: {type(decoder).__name__} "
            "takes no position_ids, so this may be the cached text once more. For new tokens omit the mask, or pass "
            "one over all columns, cached ones included; pass generate a text that goes beyond what is cached."
        )


def _check_padding_is_leading(inputs: Inputs, seen: list[int]) -> None:
    """Refuse padding after a row's first token, for models that count it."""
    for index, real in enumerate(inputs.real or []):
        before = seen[index if len(seen) > 1 else 0]
        if len(real) < inputs.columns and (before or real != list(range(inputs.columns - len(real), inputs.columns))):
            raise ValueError(
                f"attention_mask pads row {index} after its first token, and this model counts padding there: as a "
                "distance with ALiBi, as a step of a layer's state; pad on the left of the first call only."
            )


def _checked_form(mask: object, rows: int, columns: int, cached: int, size: int) -> Tensor:
    """Return a mask; one that cannot be read is refused before anything is indexed."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    if isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_complex():
        if shape in ((rows, columns), (rows, cached + columns)):
            return mask
        if len(shape) == 4 and shape[:3] in ((1, 1, columns), (rows, 1, columns)):  # noqa: PLR2004
            of_scores = mask.dtype == torch.bool or mask.is_floating_point()
            if of_scores and (shape[3] == size or columns <= shape[3] <= cached + columns):
                return mask
    got = f"a {mask.layout} tensor of {mask.dtype}, {shape}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask must be 2D, [batch, tokens], with 0 for padding; got {got}. With {cached} columns in the "
        f"cache and {columns} new ones its shape must be ({rows}, {cached + columns}), or ({rows}, {columns}) for the "
        'new ones alone. The cache makes the 4D mask; to make it yourself, use attn_implementation="sdpa" or "eager".'
    )


def _text_of(mask: Tensor, rows: int, window: int | None, size: int, stream: Stream) -> Tensor:
    """Return the 2D mask that ``generate``, or a model around the decoder, has made a 4D one of.

    They ask the cache how many keys there are (``get_mask_sizes``) and count columns: the last keys are those of the
    call, but where a step of a static cache shows all ``size`` slots they are the first columns of the text.

    Raises:
        ValueError: It hides more than the future, padding and what is behind a window, or hides less.
    """
    state, (columns, keys) = stream.state, mask.shape[2:]
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    key = torch.arange(keys, device=mask.device) + (0 if keys == size else state.columns + columns - keys)
    query = torch.arange(state.columns, state.columns + columns, device=mask.device)[:, None]
    near = key <= query
    if (visible & ~near).any():
        raise ValueError(
            "attention_mask lets tokens attend to later ones, as those of an image do in some models, and the "
            "tokens of a StreamingCache never do: use a DynamicCache for this prompt, or leave its images out."
        )
    if window is not None:
        near &= key > query - window
    tokens = visible.any(dim=1)
    biased = mask.is_floating_point() and not ((mask == 0) | (mask <= HIDDEN)).all()
    if biased or not torch.equal(visible, near & tokens[:, None]):
        raise ValueError(
            "attention_mask is a 4D mask that hides more than the future and padding, or adds other numbers to scores; "
            "pass a 2D one, [batch, tokens]."
        )
    fed = stream.tokens_fed(rows).to(mask.device)
    text = torch.cat((fed, fed.new_ones(rows, columns)), dim=1)
    shown = near.any(dim=0)  # of others the mask tells nothing
    text[:, key[shown]] = tokens[:, shown]
    return text[:, state.columns :] if state.forgot else text  # padding that is forgotten cannot be compared


def _read_mask(mask: Tensor, columns: int, stream: Stream) -> list[list[int]] | None:
    """Return each row's new columns with tokens by a 2D mask, ``None`` where all columns are.

    Raises:
        ValueError: It is not a mask of 0 and 1, or says of cached columns what is not so.
    """
    cached = mask.shape[1] - columns
    is_token = mask == 1
    counts = [part.sum(1) for part in (is_token[:, :cached], is_token[:, cached:], is_token | (mask == 0))]
    before, new, known = torch.stack(counts).tolist()  # one wait for the device
    if min(known) < cached + columns:
        raise ValueError(
            "attention_mask must hold 0 for padding and 1 for tokens, and has other values; a mask that is added to "
            "scores, or numbers packed texts, is another thing."
        )
    if cached:
        _check_cached_columns(is_token[:, :cached], before, stream)
    return None if min(new) == columns else _real_columns(is_token[:, cached:])


def _check_cached_columns(is_token: Tensor, counts: list[int], stream: Stream) -> None:
    """Refuse a mask that says other things of cached columns than what was fed.

    Args:
        is_token: ``[batch, cached columns]`` bool.
        counts: How many are tokens, row by row.
        stream: What the cache holds.
    """
    state = stream.state
    seen = [lane.seen for lane in state.lanes] * (len(counts) // len(state.lanes))
    row = next((row for row, (count, own) in enumerate(zip(counts, seen, strict=True)) if count != own), None)
    if row is None and min(counts) < state.columns and not state.forgot:  # as many of them: are they the same?
        differs = (is_token.cpu() != stream.tokens_fed(len(counts))).any(dim=1)
        row = int(differs.nonzero()[0]) if differs.any() else None
    if row is not None:
        raise ValueError(
            f"attention_mask says that row {row} has {counts[row]} tokens in the {state.columns} cached columns, and "
            f"{seen[row]} were fed{' in other places' if counts[row] == seen[row] else ''}: cached tokens cannot be "
            "hidden afterwards. Pass the mask that they were fed with, or one of the new columns alone; take tokens "
            "back with crop()."
        )


def _real_columns(mask: Tensor) -> list[list[int]]:
    """Return each row's columns with tokens.

    Raises:
        ValueError: A row has padding on the right.
    """
    rows = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    for index, real in enumerate(rows):
        if real and real[-1] != mask.shape[1] - 1:
            raise ValueError(
                f"attention_mask pads row {index} on the right, so its last column holds no token to continue from; "
                'pad on the left (tokenizer.padding_side = "left").'
            )
    return rows


def _positions_of_text(positions: Tensor, inputs: Inputs) -> Tensor:
    """Return the positions of a text by time, height and width (M-RoPE), which are equal, ``[rows, columns]``.

    Raises:
        ValueError: They differ: these are tokens of an image.
    """
    differs = (positions != positions[:1]).any(dim=0)
    for row in range(inputs.batch):
        found = differs[row if len(differs) > 1 else 0]
        if (found if inputs.real is None else found[inputs.real[row]]).any():
            raise ValueError(
                "position_ids have several components that differ, as for the tokens of an image (M-RoPE), and a "
                "StreamingCache counts tokens in one: use a DynamicCache for this prompt, or leave its images out."
            )
    return positions[0]


def _check_positions(positions: object, inputs: Inputs, state: State, *, by_kind: bool) -> None:
    """Refuse positions that are not those of the tokens: the cache makes its own.

    Tokens are numbered by natural index, as ``generate`` does, by column, or by rank in the retained list.
    """
    wanted = ((1, inputs.columns), (inputs.batch, inputs.columns))
    kinds = ((), (1,), (3,), (4,)) if by_kind else ((),)  # also behind positions by token (Qwen-VL)
    shape = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
    hint = REMEMBERED if by_kind else ""
    if not isinstance(positions, Tensor) or shape[-2:] not in wanted or shape[:-2] not in kinds:
        raise ValueError(
            f"position_ids must be a tensor of shape {wanted[1]}, got {shape}; omit it: the cache counts.{hint}"
        )
    if len(shape) == 3:  # noqa: PLR2004
        positions = _positions_of_text(positions, inputs)
    given, lanes, rows = positions.tolist(), state.lanes, state.pools[0].lanes
    for row in range(inputs.batch):
        lane, gone = (lanes[row], rows[row].evicted) if len(lanes) > 1 else (lanes[0], rows[0].evicted)
        real: Sequence[int] = range(inputs.columns) if inputs.real is None else inputs.real[row]
        found = [given[row if len(given) > 1 else 0][column] for column in real]
        naturals = list(range(lane.seen, lane.seen + len(found)))
        columns, ranks = [state.columns + column for column in real], [natural - gone for natural in naturals]
        if found not in (naturals, columns, ranks):
            raise ValueError(
                f"position_ids of row {row} begin with {found[:3]}, but its next token is number {lane.seen}: a "
                "StreamingCache gives every token its own position and takes no other. Omit position_ids; where "
                f"generate makes them, pass it the new tokens only.{hint}"
            )
