"""What a user chooses by name."""

from __future__ import annotations

from typing import Literal

__all__ = ["OnOverflow", "Positions", "check_choices"]

Positions = Literal["rank", "original"]
OnOverflow = Literal["evict", "error"]


def check_choices(on_evict: object, positions: object, on_overflow: object) -> None:
    """Refuse options that do not exist.

    Raises:
        TypeError: ``on_evict`` is not callable.
        ValueError: ``positions`` or ``on_overflow`` is unknown.
    """
    if on_evict is not None and not callable(on_evict):
        msg = f"on_evict must be callable or None, got {on_evict!r}."
        raise TypeError(msg)
    for name, value, known in (
        ("positions", positions, ("rank", "original")),
        ("on_overflow", on_overflow, ("evict", "error")),
    ):
        if value not in known:
            msg = f'{name} must be "{known[0]}" or "{known[1]}", got {value!r}.'
            raise ValueError(msg)
