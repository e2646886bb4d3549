"""The model `sinkwindow` of lm-evaluation-harness: its scores and answers are those of a `StreamingCache`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from sinkwindow import StreamingCache
from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.ways.sessions import cache_keyword

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # words for lm-eval's cache, context, continuation
Answer = tuple[float, bool]  # log-likelihood, and whether greedy decoding gives the continuation

ENDLESS = 10**12  # longer than any request; lm-eval computes with it [tokens]


@register_model("sinkwindow")
class StreamingLM(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """A Hugging Face model that reads every request through a `StreamingCache`, each as a text of its own.

    Every log-likelihood, and every generated token, is what feeding the request's tokens one at a time gives. They are
    fed in long calls, which give the same.

    - No request is truncated: `max_length` is `ENDLESS`, whatever length the model was trained on. A document of
      `loglikelihood_rolling` is one stream from its first token to its last, not a row of disjoint windows.
    - A token that is evicted cannot be recalled, also when it belongs to the question or to its examples.
    - Requests that differ in their last token alone share one pass, as with `logits_cache` of `HFLM`. This changes no
      number and cannot be turned off.

    Args:
        pretrained: A hub id, a folder, or a loaded model.
        num_sinks: S, first tokens to keep [tokens].
        window: W, most recent tokens that survive an eviction [tokens].
        buffer: B, how far the list may overgrow before one [tokens].
        **options: All other arguments of `HFLM`, except those that are refused.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is out of range, the model cannot stream, `batch_size` is `auto`, or `max_length` or
            `truncation` is given.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        num_sinks: int = 4,
        window: int = 1020,
        buffer: int = 64,
        **options: Any,
    ) -> None:
        if options.get("max_length") is not None or options.get("truncation"):
            raise ValueError(
                "max_length and truncation have no meaning in a stream: leave them out, and choose window."
            )
        if str(options.get("batch_size", 1)).startswith("auto"):
            raise ValueError(f"batch_size={options['batch_size']!r} is not supported: give a number of requests.")
        super().__init__(pretrained, **options)
        self._cache = StreamingCache(self.model, num_sinks, window, buffer)
        self._cache_keyword = cache_keyword(self.model)
        self._slices_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def max_length(self) -> int:
        """No request is too long."""
        return ENDLESS

    def _model_call(self, inps: torch.Tensor, *, last: int) -> torch.Tensor:
        """Feed the stream's next tokens `[rows, tokens]`; return the logits of the last ones, `[rows, last, vocab]`."""
        options = {"logits_to_keep": last} if self._slices_logits else {}
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits: torch.Tensor = self.model(inps, **{self._cache_keyword: self._cache}, **options).logits
        return logits[:, -last:]

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Generate after contexts `[rows, columns]`, padded on the left."""
        self._cache.reset()
        options[self._cache_keyword] = self._cache
        made: torch.Tensor = super()._model_generate(context, *args, **options)
        return made

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - the order is lm-eval's
        override_bs: int | None = None,  # noqa: ARG002 - never more than the batch size
    ) -> list[Answer]:
        """Score continuations, in the order of the requests; all that read the same tokens share one row."""
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            readers.setdefault((*context, *continuation[:-1]), []).append(index)
        rows = sorted(readers, key=lambda ids: (-len(ids), ids))
        size, answers = self.batch_size, dict[int, Answer]()
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or self.rank != 0) as bar:
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                asked = [(row, index) for row, ids in enumerate(batch) for index in readers[ids]]
                found = self._score(batch, [(row, requests[index][2]) for row, index in asked])
                for (_, index), answer in zip(asked, found, strict=True):
                    answers[index] = answer
                    if (words := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", words, answer)
                bar.update(len(asked))
        return [answers[index] for index in range(len(requests))]

    def _score(self, rows: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, list[int]]]) -> list[Answer]:
        """Score continuations, given as the index of a row and tokens, of which the row holds all but the last."""
        starts = [len(rows[row]) - len(continuation) for row, continuation in asked]
        found: list[list[torch.Tensor]] = [[] for _ in asked]  # log-probabilities of the tokens
        missed: list[list[torch.Tensor]] = [[] for _ in asked]  # whether another token was more probable
        for begin, scores in self._read(rows, min(starts)):
            choices = scores.argmax(dim=-1)
            for index, ((row, continuation), start) in enumerate(zip(asked, starts, strict=True)):
                low, high = max(start, begin), min(len(rows[row]), begin + scores.shape[1])
                if low < high:
                    tokens = torch.tensor(continuation[low - start : high - start], device=scores.device)
                    place = row, slice(low - begin, high - begin)
                    found[index].append(scores[place].gather(1, tokens[:, None])[:, 0])
                    missed[index].append(choices[place] != tokens)
        return [
            (float(torch.cat(own).cpu().double().sum()), not bool(torch.cat(wrong).any()))
            for own, wrong in zip(found, missed, strict=True)
        ]

    def _read(self, rows: Sequence[tuple[int, ...]], first: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Read rows, the longest first; yield columns and log-probabilities `[rows, columns, vocab]` from `first` on.

        Rows are padded on the right, where no token that counts can see it, and leave the batch when they have ended.
        Logits are never there for more than one call of `BLOCK` columns.
        """
        self._cache.reset()
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
        for begin in range(0, ids.shape[1], BLOCK):
            end, reading = min(begin + BLOCK, ids.shape[1]), sum(len(row) > begin for row in rows)
            if begin and reading < self._cache.batch_size:
                self._cache.batch_select_indices(torch.arange(reading))
            column = min(max(begin, first), end - 1)
            logits = self._model_call(ids[:reading, begin:end], last=end - column)
            if end > first:
                yield column, F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
