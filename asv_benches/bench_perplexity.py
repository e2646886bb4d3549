"""Perplexity of the embedded model: a small text, the same to six digits in every run on a machine."""

from __future__ import annotations

from typing import ClassVar

from .common import lab, shown_as

CONFIGURATIONS = ["baseline", "streaming_4_60", "streaming_4_252", "window_0_64"]
TOKENS = 512  # eight limits of the smallest window [tokens]
BLOCK = 128  # tokens per call, so that calls cross evictions [tokens]
DIGITS = 6  # significant; float32 sums differ beyond them


def rounded(value: float) -> float:
    """Round to the digits that are the same in every run."""
    return float(f"{value:.{DIGITS}g}")


class Perplexity:
    """Perplexity of the first tokens of the embedded plays, in one session; a wrong cache shows in the PPL itself."""

    params: ClassVar = [CONFIGURATIONS]
    param_names: ClassVar = ["configuration"]
    timeout = 120

    def setup_cache(self) -> dict[str, float] | None:
        """Load the model and measure all configurations, once per run."""
        import torch  # noqa: PLC0415 - discovery must not import it

        torch.set_num_threads(1)  # the order of summation, and so the last digits, depend on it
        try:
            models, corpora, tokens = lab("inputs.models"), lab("inputs.corpora"), lab("inputs.tokens")
            configurations, perplexity = lab("ways.configurations"), lab("measure.perplexity")
        except NotImplementedError:
            return None
        loaded = models.load_model()
        text = tokens.encode(corpora.load_corpus("shakespeare"), loaded.tokenizer, tokens=TOKENS)
        measured = {}
        for name in CONFIGURATIONS:
            record = perplexity.measure(configurations.parse(name), loaded.model, text, block=BLOCK).record
            measured[name] = rounded(record.perplexity)
        return measured

    setup_cache.timeout = 900  # type: ignore[attr-defined]  # the first time, the weights are unpacked

    def setup(self, measured: dict[str, float] | None, configuration: str) -> None:
        """Skip commits without a lab."""
        if measured is None or configuration not in measured:
            raise NotImplementedError("this commit cannot measure perplexity")

    @shown_as("Perplexity, Shakespeare", unit="PPL")
    def track_perplexity(self, measured: dict[str, float], configuration: str) -> float:
        """Return the measured value."""
        return measured[configuration]
