"""Whether a rule and its options fit a model: every check of the constructor, and what follows from them."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Literal

from sinkwindow.arguments import read_choice
from sinkwindow.retention import Retention
from sinkwindow.storage.slots import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkwindow.model.families import LayerKind, ModelFacts

Positions = Literal["rank", "original"]
OnOverflow = Literal["evict", "error"]


def check_fit(
    decoder: PreTrainedModel, facts: ModelFacts, rule: Retention, options: dict[str, object], *, static: bool
) -> None:
    """Check everything that the constructor of ``StreamingCache`` is given, before anything changes.

    Args:
        decoder: The model.
        facts: What is known of it.
        rule: The rule.
        options: ``on_evict``, ``positions`` and ``on_overflow`` by name.
        static: Whether calls of one token have fixed shapes.

    Raises:
        TypeError: ``on_evict`` is not callable.
        ValueError: An option is unknown, or does not fit the model or another option.

    Warns:
        UserWarning: The list is longer than the model's trained length, or positions are original.
    """
    on_evict = options["on_evict"]
    if on_evict is not None and not callable(on_evict):
        raise TypeError(f"on_evict must be callable or None, got {on_evict!r}.")
    read_choice("positions", options["positions"], ("rank", "original"))
    read_choice("on_overflow", options["on_overflow"], ("evict", "error"))
    read_choice("static", static, (True, False))
    _check_lengths(rule, facts)
    if static:
        _check_static(decoder, facts, {"evict": rule.evict, **options})
    if options["positions"] == "original":
        _check_original_positions(facts)


def position_bound(rule: Retention, facts: ModelFacts, *, static: bool) -> int:
    """Return the position that rotations stay below.

    The trained length, if a list fits. Rotations see differences only, so where the list nearly fills the trained
    length, positions may exceed it by a window: otherwise every eviction would rotate (and round) every key again.
    Frequencies that depend on the largest position do not allow that. A static cache has no bound.
    """
    if static:
        return sys.maxsize
    roomy = rule.capacity if facts.length_dependent else rule.capacity + rule.window
    return max(facts.trained_length or roomy, roomy)


def longest_call(rule: Retention, facts: ModelFacts) -> int | None:
    """Return how many columns a call may attend to, cached ones included, ``None`` for any number.

    Evicting by call, lists grow with the call: a window of all the model's layers would hide the sinks of a longer one.
    """
    limits = (facts.longest, facts.native_window if rule.evict == "call" else None)
    return min((limit for limit in limits if limit is not None), default=None)


def pools_of(facts: ModelFacts, rule: Retention, *, ranked: bool, static: bool) -> list[Pool]:
    """Return a pool for each kind of layer: under the stream's rule, or under a window of its own.

    Raises:
        ValueError: A window of one token, which leaves nothing to cache.
    """
    return [Pool(_rule_of(kind, rule), kind.rotary, kind.layers, ranked, static) for kind in facts.kinds]


def _rule_of(kind: LayerKind, rule: Retention) -> Retention:
    if kind.window is None:
        return rule
    if kind.window < 2:  # noqa: PLR2004
        raise ValueError(f"The model's own sliding window of {kind.window} tokens is too short to be cached.")
    return Retention(0, kind.window - 1)  # a window counts the query's own token


def _check_lengths(rule: Retention, facts: ModelFacts) -> None:
    """Compare the longest list with what the model can rotate and attend to."""
    sizes = f"num_sinks + window + buffer + 1 = {rule.capacity}"
    if facts.native_window is not None and rule.capacity > facts.native_window:
        raise ValueError(
            f"{sizes} exceeds the model's own sliding window of {facts.native_window} tokens, which would hide the "
            "sinks; choose a smaller window or buffer."
        )
    if facts.trained_length is None or rule.capacity <= facts.trained_length:
        return
    if facts.longest is not None:
        what = f"table of {facts.longest} positions"
        if facts.scales_queries:
            what = f"{facts.longest} positions, beyond which it scales queries by their position in the text"
        raise ValueError(f"{sizes} exceeds the model's {what}; choose a smaller window or buffer.")
    warnings.warn(
        f"{sizes} exceeds the {facts.trained_length} positions that the model was trained on; beyond them quality "
        "falls. Choose a smaller window or buffer.",
        UserWarning,
        stacklevel=4,
    )


def _check_original_positions(facts: ModelFacts) -> None:
    """Warn of positions that do not move, and refuse them where there are none: ALiBi follows the order of the keys."""
    if facts.trained_length is None or not any(kind.rotary.inv_freq.numel() for kind in facts.kinds):
        raise ValueError(
            'positions="original" needs rotary positions, which this model does not have; use positions="rank".'
        )
    warnings.warn(
        f'positions="original" is right only below the {facts.trained_length} positions that the model was trained on; '
        "a call beyond them is refused.",
        UserWarning,
        stacklevel=4,
    )


def _check_static(decoder: PreTrainedModel, facts: ModelFacts, options: dict[str, object]) -> None:
    """Refuse what no step at fixed shapes can do."""
    name = type(decoder).__name__
    only: dict[str, object] = {"evict": "token", "on_evict": None, "positions": "rank", "on_overflow": "evict"}
    for argument, value in options.items():
        if value != only[argument]:
            raise ValueError(
                f"static=True requires {argument}={only[argument]!r}, got {value!r}: use that, or static=False."
            )
    if facts.states:
        raise ValueError(
            f"static=True needs layers that attend, and some of {name} keep a state instead: use static=False."
        )
    if facts.own_attention:
        raise ValueError(
            f"static=True needs a model that takes a 4D mask, and {name} has an attention of its own: use static=False."
        )
    if facts.length_dependent:
        raise ValueError(
            f"static=True lets positions grow indefinitely, and {name}'s rotary frequencies or tables depend on the "
            "largest one: use static=False."
        )
    if decoder.device.type == "mps":
        raise ValueError("static=True needs float64 for its angles, which MPS does not support: use static=False.")
