"""Numbers and rows as callers have them, read or refused by name."""

from __future__ import annotations

import operator
import os
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 2**31 - 1  # a size beyond it is a mistake


def read_int(name: str, value: object, least: int, most: int) -> int:
    """Return an integer argument; integers of numpy and tensors with one integer are integers too.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is out of range.
    """
    number = _index(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, got {number}.")
    return number


def read_ints(name: str, value: Any, least: int, most: int) -> list[int]:
    """Return the integers of a list, or of anything else that lists them.

    Raises:
        TypeError: It lists nothing, or something that is not an integer.
        ValueError: One is out of range.
    """
    try:
        listed = list(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a list of ints, got {value!r} of type {type(value).__name__}.") from error
    return [read_int(f"Each of {name}", one, least, most) for one in listed]


def read_float(name: str, value: Any, least: float, most: float) -> float:
    """Return a number, which need not be an integer.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not least <= float(value) <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {value!r}.")
    return float(value)


def _index(value: Any) -> int | None:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in {"bool", "torch.bool"}:
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a tensor without data raises RuntimeError
        return None


def read_choice(name: str, value: Any, choices: tuple[object, ...]) -> Any:
    """Return a value that is one of some, by type too: 1 is not True.

    Raises:
        ValueError: It is something else.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        known = " or ".join(f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {known}, got {value!r}.")
    return value


def read_path(name: str, value: object) -> Path:
    """Return a path.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, a str or os.PathLike, got {type(value).__name__}.")
    return Path(value)


def read_text(name: str, value: object) -> str:
    """Return a text.

    Raises:
        TypeError: It is no str.
        ValueError: It has half a character, a lone surrogate, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{name} has half a character, {half!r}, at {error.start}: repair or remove it.") from error
    return value


def read_rows(name: str, value: object, rows: int) -> Tensor:
    """Return indices of rows as an int64 tensor, ``[indices]``; a bool mask has one value for each row.

    Raises:
        TypeError: They are not integers or bools.
        ValueError: They are not one-dimensional, none, or out of range.
    """
    try:
        index = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor of row indices, got {type(value).__name__}.") from error
    shape = tuple(index.shape)
    if index.is_floating_point() or index.is_complex() or index.is_meta:
        raise TypeError(f"{name} must hold integers, got {index.dtype} on {index.device}.")
    if index.dtype == torch.bool:
        if shape != (rows,):
            raise ValueError(f"{name} is a bool mask of shape {shape}; with {rows} rows it must be ({rows},).")
        index = index.nonzero()[:, 0]
    if index.dim() != 1 or not index.numel():
        raise ValueError(f"{name} must name at least one row, [indices]; got shape {shape} and {index.numel()} rows.")
    wrong = [row for row in index.tolist() if not 0 <= row < rows]
    if wrong:
        raise ValueError(f"{name} must be between 0 and {rows - 1}, since the cache holds {rows} rows; got {wrong[0]}.")
    return index.long()
