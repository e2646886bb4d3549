"""Two ways to read a text: token by token, and in long calls. The losses are the same, the speed is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from sinkwindow_lab import files
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.inputs.tokens import TokenText
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.measure.perplexity import Perplexity
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.ways.configurations import Configuration

Method = Literal["token", "blocks"]
METHODS: dict[str, tuple[Method, ...]] = {"token": ("token",), "blocks": ("blocks",), "both": ("token", "blocks")}


@dataclass(frozen=True)
class Scores:
    """One text read by one or two methods."""

    found: dict[Method, Perplexity]

    @property
    def main(self) -> Perplexity:
        """The last one measured: `blocks` if both were requested."""
        return list(self.found.values())[-1]

    @property
    def speed_ratio(self) -> float | None:
        """Time of token by token over time of blocks; None unless both were measured."""
        if len(self.found) < 2:  # noqa: PLR2004 - both
            return None
        return self.found["token"].record.seconds / self.found["blocks"].record.seconds

    @property
    def largest_difference(self) -> float | None:
        """Largest difference of a target's loss between the two; None unless both were measured."""
        if len(self.found) < 2:  # noqa: PLR2004 - both
            return None
        return float((self.found["token"].nll - self.found["blocks"].nll).abs().max())


def methods(name: str) -> tuple[Method, ...]:
    """Parse the option `--method`: `token`, `blocks` or `both`. Return the methods in the order in which they run.

    Raises:
        LabError: if `name` is none of them.
    """
    if name not in METHODS:
        raise LabError(f"--method {name} is unknown; choose token, blocks or both")
    return METHODS[name]


def score(
    configuration: Configuration,
    loaded: LoadedModel,
    text: TokenText,
    chosen: tuple[Method, ...],
    *,
    block: int,
    reporter: Reporter,
) -> Scores:
    """Score a text by each method; `block` is the number of tokens per call of the method `blocks`.

    Raises:
        LabError: if the configuration does not fit the model, or an option is out of range.
    """
    found: dict[Method, Perplexity] = {}
    for method in chosen:
        reporter.begin(f"PPL {configuration.name}, {text.corpus}, {method}", len(text.targets))
        found[method] = perplexity.measure(
            configuration,
            loaded.model,
            text,
            block=1 if method == "token" else block,
            on_block=reporter.advance,
        )
    return Scores(found)


def save_losses(path: Path, scores: Scores, text: TokenText, **metadata: str) -> None:
    """Write a safetensors file of every target's loss.

    It holds `nll_token`, `nll_blocks`, `targets` (ids) and `lengths` (tokens of each text); `metadata` are strings for
    its header, such as the records as JSON.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors = {f"nll_{method}": one.nll for method, one in scores.found.items()}
    tensors["targets"] = text.targets.contiguous()
    tensors["lengths"] = torch.tensor([one.shape[1] for one in text.texts])
    files.write_bytes(path, save(tensors, metadata=metadata))
