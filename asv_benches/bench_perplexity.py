"""Perplexity of the embedded model: a small text, the same to six digits in every run on a machine."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from .common import Combination, Suite, attempt, lab, shown_as

TOKENS = 512  # eight limits of the smallest window [tokens]
BLOCK = 128  # tokens per call, so that calls cross evictions [tokens]
DIGITS = 6  # significant; float32 sums differ beyond them


def rounded(value: float) -> float:
    """Round to the digits that are the same in every run."""
    return float(f"{value:.{DIGITS}g}")


class Perplexity(Suite):
    """Perplexity of the first tokens of the embedded plays, in one session; a wrong cache shows in the PPL itself."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_60", "streaming_4_252", "window_0_64"]]
    param_names: ClassVar = ["configuration"]

    def setup_cache(self) -> dict[Combination, Any]:
        """Load the model and measure all configurations."""
        importlib.import_module("torch").set_num_threads(
            1
        )  # the order of summation, and so the last digits, depend on it
        loaded = attempt(lambda: lab("inputs.models").load_model())
        return {one: attempt(self.measure, loaded, *one) for one in self.combinations()}

    def measure(self, loaded: Any, configuration: str) -> float:
        """Return the perplexity."""
        if isinstance(loaded, Exception):
            raise loaded
        corpus = lab("inputs.corpora").load_corpus("shakespeare")
        text = lab("inputs.tokens").encode(corpus, loaded.tokenizer, tokens=TOKENS)
        chosen = lab("ways.configurations").parse(configuration)
        result = lab("measure.perplexity").measure(chosen, loaded.model, text, block=BLOCK)
        return rounded(getattr(result, "record", result).perplexity)  # earlier commits return a record within

    @shown_as("Perplexity, Shakespeare", unit="PPL")
    def track_perplexity(self, *_: object) -> float:
        """Return what was measured."""
        return float(self.found)
