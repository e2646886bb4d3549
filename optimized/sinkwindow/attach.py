"""How a cache gets between a model and its attention: three hooks, and nothing of the model replaced.

* before the decoder runs, the cache plans the call and rewrites ``position_ids`` and ``attention_mask``;
* after it ran, the cache takes the call over; after it failed, the cache forgets it;
* the rotary module's angles, which transformers makes in float32, are made again in float64: everywhere for a float64
  model, for a float32 one beyond the positions that a list can fill, where a float32 angle is no longer as good.

The hooks are plain functions without state: they act on calls that carry a ``StreamingCache`` and return at once for
all others, survive pickling and copying of the model, and are removed with the last cache that uses the model.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from sinkwindow.angles import sharpen
from sinkwindow.attention import ATTENTION_NAME, enter_call, leave_call
from sinkwindow.families import rotary_modules
from sinkwindow.split import Pieces, run_ahead

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from sinkwindow.attention import BandedLayer
    from sinkwindow.cache import StreamingCache

__all__ = ["CACHE_NAMES", "attach", "close_call", "detach", "open_call", "open_step"]

CACHE_NAMES = ("cache", "past_key_values")  # transformers >= 5.24 and before


@dataclass(slots=True)
class _Attachment:
    """The hooks of one decoder, the caches that need them, and what belongs to the call under way.

    Attributes:
        handles: Of the hooks.
        users: Caches that are attached.
        owner: The one whose call is under way.
        lent: The decoder's own attention, whose place the call has borrowed.
        pieces: What has run of a call that came split.
    """

    handles: list[RemovableHandle]
    users: set[int] = field(default_factory=set)
    owner: int | None = None
    lent: str | None = None
    pieces: Pieces | None = None


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
Finalizer: TypeAlias = "weakref.finalize[[weakref.ref[PreTrainedModel], int], StreamingCache]"


def attach(decoder: PreTrainedModel, cache: StreamingCache) -> Finalizer:
    """Hook a decoder for a cache; the hooks go when the returned finalizer runs, at the latest with the cache."""
    if decoder not in _attachments:
        _strip_copied_hooks(decoder)
        handles = [
            decoder.register_forward_pre_hook(_before_forward, with_kwargs=True),
            decoder.register_forward_hook(_after_forward, with_kwargs=True),
            decoder.register_forward_hook(_after_any_forward, with_kwargs=True, always_call=True),
        ]
        handles += [module.register_forward_hook(_exact_angles, with_kwargs=True) for module in rotary_modules(decoder)]
        _attachments[decoder] = _Attachment(handles)
    _attachments[decoder].users.add(id(cache))
    return weakref.finalize(cache, detach, weakref.ref(decoder), id(cache))


def _strip_copied_hooks(decoder: PreTrainedModel) -> None:
    """Take away the hooks that a copy of an attached model has inherited: no handle of theirs is left."""
    ours = {_before_forward, _after_forward, _after_any_forward, _exact_angles}
    for module in (decoder, *rotary_modules(decoder)):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # noqa: SLF001
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


def detach(decoder_ref: weakref.ref[PreTrainedModel], user: int) -> None:
    """Release a decoder; its last user takes the hooks away."""
    decoder = decoder_ref()
    attachment = None if decoder is None else _attachments.get(decoder)
    if decoder is None or attachment is None:
        return
    attachment.users.discard(user)
    if attachment.owner == user:
        close_call(decoder)
    if not attachment.users:
        for handle in attachment.handles:
            handle.remove()
        del _attachments[decoder]


def open_call(
    decoder: PreTrainedModel, cache: StreamingCache, banded: dict[int, BandedLayer] | None, exact_from: int
) -> None:
    """Let a streaming call begin: with a band, the decoder's attention steps back for as long as the call lasts."""
    weights = banded is not None and decoder.config._attn_implementation == "eager"  # noqa: SLF001
    enter_call(banded, weights=weights, exact_from=exact_from)
    open_step(decoder, cache, None if banded is None else ATTENTION_NAME)


def open_step(decoder: PreTrainedModel, cache: StreamingCache, attention: str | None) -> None:
    """Let a call of fixed shapes begin, with an attention of ours in the place of the decoder's own."""
    _attachments[decoder].owner = id(cache)
    if attention is not None:
        _attachments[decoder].lent = decoder.config._attn_implementation  # noqa: SLF001
        decoder.config._attn_implementation = attention  # noqa: SLF001


def close_call(decoder: PreTrainedModel) -> None:
    """Put the decoder's own attention back, if a call has borrowed its place."""
    leave_call()
    attachment = _attachments.get(decoder)
    if attachment is not None:
        attachment.owner = None
    if attachment is not None and attachment.lent is not None:
        decoder.config._attn_implementation = attachment.lent  # noqa: SLF001
        attachment.lent = None
    if attachment is not None and attachment.pieces is not None:  # the last piece failed: the others did not happen
        pieces, attachment.pieces = attachment.pieces, None
        pieces.cache.restore(pieces.before)


def _cache_of(kwargs: dict[str, Any]) -> StreamingCache | None:
    from sinkwindow.cache import StreamingCache  # noqa: PLC0415 - the cache imports this module

    for name in CACHE_NAMES:
        if isinstance(kwargs.get(name), StreamingCache):
            cache: StreamingCache = kwargs[name]
            return cache
    return None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the positional arguments of a forward call."""
    if not args:
        return kwargs
    return dict(zip(_parameters(module), args, strict=False)) | kwargs


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # noqa: SLF001
def _parameters(module: nn.Module) -> list[str]:
    """Name a forward's parameters: once per class, unless a module has a forward of its own, as accelerate gives it."""
    forward, shared = module.forward, type(module).forward
    if getattr(forward, "__func__", None) is shared:
        return _parameters_of(shared)[1:]  # without self
    return list(inspect.signature(forward).parameters)


@functools.cache
def _parameters_of(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    decoder = cast("PreTrainedModel", module)
    if not torch.compiler.is_compiling():
        close_call(decoder)  # torch runs no hook after a KeyboardInterrupt: the next call, whosever it is, cleans up
    named = _named(module, args, kwargs)
    cache = _cache_of(named)
    if cache is None:
        return None
    if torch.compiler.is_compiling():
        arguments, attention = cache.begin_step(decoder, named)
        if attention is not None:
            decoder.config._attn_implementation = attention  # noqa: SLF001
        return (), arguments
    pieces, named = run_ahead(decoder, cache, named)
    arguments = cache.begin_call(decoder, named)
    _attachments[decoder].pieces = pieces
    return (), arguments


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:  # noqa: ARG001
    cache = _cache_of(kwargs)
    if cache is None:
        return None
    if torch.compiler.is_compiling():
        if (lent := cache.commit_step()) is not None:
            cast("PreTrainedModel", module).config._attn_implementation = lent  # noqa: SLF001
        return None
    attachment = _attachments[module]
    pieces, attachment.pieces = attachment.pieces, None
    try:
        cache.commit_call()
    except BaseException:
        if pieces is not None:
            cache.restore(pieces.before)
        raise
    return None if pieces is None else pieces.joined(output)


def _after_any_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return
    cache = _cache_of(_named(module, args, kwargs))
    if cache is not None:
        close_call(cast("PreTrainedModel", module))
        cache.rollback()


def _exact_angles(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return sharpen(module, _named(module, args, kwargs), output)
