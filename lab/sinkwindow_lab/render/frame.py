"""Measurements as a pandas table in long form: a page's tables, ratios and pictures are pivots of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from sinkwindow_lab.records import Measurement
from sinkwindow_lab.render.markdown import NOT_MEASURED


def frame(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """Return a row per measurement: its fields, and `value`, the median of its samples."""
    rows = [{**one.model_dump(), "value": one.median} for one in measurements]
    return pd.DataFrame(rows, columns=[*Measurement.model_fields, "value"]).astype({"at": float})  # NaN for no place


def cell(value: Any, write: Callable[[Any], str]) -> str:
    """Return a value as words, or the mark of what was not measured."""
    return NOT_MEASURED if value is None or (isinstance(value, float) and pd.isna(value)) else write(value)
