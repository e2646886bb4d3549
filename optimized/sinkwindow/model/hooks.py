"""How a cache gets between a model and its attention: hooks, and nothing of the model replaced.

* Before the module that the user called runs, its cache opens a call.
* Before the decoder runs, the cache plans the call and rewrites ``position_ids`` and ``attention_mask``.
* After the module that the user called has returned, the cache counts the call. One that fails earlier, in whatever
  way, is not counted: nothing has to be undone.
* After a rotary module has run, its tables are made again where a call asks for it (``exact_rope.py``).

The hooks are plain functions without state: they act on calls that carry a ``StreamingCache`` and return at once for
all others, survive pickling and copying of the model, and are removed with the last cache that uses the model.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from sinkwindow.attention.step import STEP_NAME, is_tracing, uncompiled
from sinkwindow.model.calls import Calls
from sinkwindow.model.exact_rope import hooked, recompute_tables
from sinkwindow.model.rope import rotary_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from sinkwindow.model.open_call import OpenCall

CACHE_NAMES = ("cache", "past_key_values")  # transformers >= 5.24 and before
# Methods in which a cache spends its time during a call: to measure that time, wrap them on one cache.
CACHE_WORK = ("_begin", "update", "_end")


@dataclass(slots=True)
class _Attachment:
    """The hooks of one module.

    Attributes:
        rotary: The modules inside that have hooks too.
        places: Hooks that have a place among a user's, as the module's attribute that holds them, their number, and
            whether they run after all others there, or before them; empty until all are there.
        users: Caches that need them.
    """

    rotary: list[nn.Module]
    places: list[tuple[str, int, bool]] = field(default_factory=list)
    users: set[int] = field(default_factory=set)


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # a cache may be collected, and so detached, while another one is attached


def attach(model: nn.Module, decoder: PreTrainedModel, cache: Calls) -> weakref.finalize[Any, Any]:
    """Hook a model and its decoder for a cache.

    Returns:
        Its call removes the hooks, if no other cache needs them; it happens at the latest with the cache.
    """
    modules = [decoder] if model is decoder else [decoder, model]
    finalizer = weakref.finalize(cache, _detach, tuple(weakref.ref(module) for module in modules), id(cache))
    try:
        with _lock:
            for module in modules:
                _hook(module, id(cache), is_decoder=module is decoder)
        return finalizer  # noqa: TRY300 - here, so that Ctrl-C before this line removes the hooks too
    except BaseException:  # a part of the hooks is there, and the exception keeps the cache
        finalizer()
        raise


def _hook(module: nn.Module, user: int, *, is_decoder: bool) -> None:
    attachment = _attachments.get(module)
    if attachment is None:
        attachment = _attachments[module] = _Attachment(rotary_modules(module) if is_decoder else [])
    attachment.users.add(user)
    if not attachment.places:
        _strip_hooks(module, attachment)  # those that a copy of an attached model has inherited
        hook = module.register_forward_pre_hook(_before_decoder if is_decoder else _before_model, with_kwargs=True)
        places = []
        if is_decoder:  # a call's pieces run between these two, so that a user's hooks run once, around all of them
            places += [("_forward_pre_hooks", hook.id, True)]
            places += [("_forward_hooks", module.register_forward_hook(_after_decoder, with_kwargs=True).id, False)]
        for part in (module, *attachment.rotary):
            hooked[id(part)] = part
        for rotary in attachment.rotary:
            rotary.register_forward_hook(_after_rotary, with_kwargs=True)
        # A call counts when all hooks have returned.
        places += [("_forward_hooks", module.register_forward_hook(_after_call, with_kwargs=True).id, True)]
        attachment.places = places


def _strip_hooks(module: nn.Module, attachment: _Attachment) -> None:
    """Remove our hooks, which are known by their functions: an interruption may have left any part of them."""
    ours = {_before_model, _before_decoder, _after_decoder, _after_call, _after_rotary}
    for part in (module, *attachment.rotary):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


def _detach(modules: tuple[weakref.ref[nn.Module], ...], user: int) -> None:
    with _lock:
        for reference in modules:
            module = reference()
            attachment = None if module is None else _attachments.get(module)
            if module is None or attachment is None:
                continue
            attachment.users.discard(user)
            if not attachment.users:
                _strip_hooks(module, attachment)
                _restore_attention(module)
                del _attachments[module]


@contextmanager
def call_by_hand(cache: Calls, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Do what the hooks do around a call, with the block in the place of the layers: to measure a cache alone.

    Args:
        cache: The cache; the block calls its ``update`` for every layer.
        decoder: The model that it was made for.
        kwargs: The decoder's arguments by name; ``input_ids`` is enough.

    Yields:
        The arguments, rewritten.
    """
    cache._open(decoder)
    yield cache._begin(decoder, kwargs)
    cache._end(decoder)


# -- the hooks --------------------------------------------------------------------------------------------------------


def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache_of(_named(module, args, kwargs) if args else kwargs)
    if cache is not None and not is_tracing() and cache._model() is module:
        _open(cache, module)


def _before_decoder(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    decoder, named = cast("PreTrainedModel", module), _named(module, args, kwargs) if args else kwargs
    cache = _cache_of(named)
    if cache is None:
        return None
    if is_tracing():
        return (), _begin_traced(cache, decoder, named)
    return (), _begin(cache, decoder, named)


def _after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
    cache = _cache_of(kwargs)
    if cache is None:
        return None
    if is_tracing() and cache._call is None:
        _restore_attention(module)
        cache._commit_traced()
        return None
    return _complete(cache, output)


def _after_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    cache = _cache_of(_named(module, args, kwargs) if args else kwargs)
    if cache is not None and (not is_tracing() or cache._call is not None):
        _end(cache, module)


def _after_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return recompute_tables(module, _named(module, args, kwargs) if args else kwargs, output)


# A call that is no step runs uncompiled, in the middle of a compiled model too.
_complete = uncompiled(Calls._complete)


@uncompiled
def _open(cache: Calls, module: nn.Module) -> None:
    for part in (module, cache._checks.decoder()):  # the user may have registered hooks since
        attachment = None if part is None else _attachments.get(part)
        for name, number, is_last in () if attachment is None else attachment.places:
            hooks = getattr(part, name)
            if number in hooks:
                hooks.move_to_end(number, last=is_last)
    cache._open(module)


@uncompiled
def _begin(cache: Calls, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    _restore_attention(decoder)  # a step whose graph was broken has failed
    hooks = decoder._forward_pre_hooks  # which torch has listed already: to move ours helps from the next call on
    late = next(reversed(hooks.values()), None) is not _before_decoder
    _open(cache, decoder)
    cast("OpenCall", cache._call).late = late
    return cache._begin(decoder, kwargs)


@uncompiled
def _end(cache: Calls, module: nn.Module) -> None:
    cache._end(module)


def _begin_traced(cache: Calls, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Begin a step; where ``sdpa`` would copy grouped keys, trace the attention that does not.

    The assignment is the tracer's: it is undone before the graph ends. Where a model breaks the graph, others see it in
    between, and for them the attention is ``sdpa`` nevertheless (``attention/step.py``).
    """
    _restore_attention(decoder)
    arguments = cache._begin_traced(decoder, kwargs)
    if decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = STEP_NAME
    return arguments


def _restore_attention(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) == STEP_NAME:
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]


def _cache_of(kwargs: dict[str, Any]) -> Calls | None:
    """Return the cache of a call if it is ours; without a loop, since this runs in each hook of each token."""
    given, other = kwargs.get(CACHE_NAMES[0]), kwargs.get(CACHE_NAMES[1])
    if given is None:
        given = other
    elif other is not None and other is not given and (isinstance(given, Calls) or isinstance(other, Calls)):
        raise ValueError(f"{' and '.join(CACHE_NAMES)} are two names of one argument, and got two caches: pass one.")
    return given if isinstance(given, Calls) else None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name."""
    return {**dict(zip(_parameters(id(module)), args, strict=False)), **kwargs}


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _parameters(number: int) -> list[str]:
    """Return the names of the parameters of a hooked module's forward, none for a copy that has inherited the hooks.

    Once per class, unless a module has a forward of its own, as accelerate gives it.
    """
    module = hooked.get(number)
    if module is None:
        return []
    forward, shared = module.forward, type(module).forward
    if getattr(forward, "__func__", None) is shared:
        return _names(shared)[1:]  # without self
    return list(inspect.signature(forward).parameters)


@functools.cache
def _names(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)
