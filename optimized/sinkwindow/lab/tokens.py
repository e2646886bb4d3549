"""From text to the token ids that every configuration is scored on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinkwindow.lab.errors import LabError

if TYPE_CHECKING:
    from sinkwindow.lab.corpora import Corpus
    from sinkwindow.lab.records import BosPolicy

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer here needs; a longer slice is taken when it turns out too short
MARGIN = 256  # tokens beside the cut of a slice that are thrown away: they may depend on what follows


@dataclass(frozen=True)
class TokenText:
    """A tokenised piece of a corpus.

    Attributes:
        corpus: the corpus' name.
        ids: [1, tokens], on the CPU.
        bos: whether a BOS token was put in front.
        text_bytes: UTF-8 bytes of the text behind the targets, that is of tokens 1 .. n-1 [bytes].
    """

    corpus: str
    ids: torch.Tensor
    bos: BosPolicy
    text_bytes: int

    @property
    def sha256(self) -> str:
        """Digest of the token ids (little-endian int64): equal means the same targets."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def encode(corpus: Corpus, tokenizer: Any, *, tokens: int, bos: BosPolicy = "none") -> TokenText:
    """Tokenises the beginning of a corpus.

    Special tokens are never added by the tokenizer; BOS is this function's business alone, so that it cannot come
    twice.

    Args:
        corpus: the text.
        tokenizer: a Hugging Face tokenizer.
        tokens: how many token ids to return, BOS included; fewer if the text ends before [tokens].
        bos: `add` puts the tokenizer's BOS token in front, `none` does not.

    Returns:
        The token ids and what they stand for.

    Raises:
        LabError: if fewer than two tokens come out, `tokens` is below 2, or BOS is asked for and there is none.
    """
    if tokens < 2:  # noqa: PLR2004 - a perplexity needs a token and a target
        message = f"tokens={tokens} leaves nothing to predict: ask for 2 or more"
        raise LabError(message)
    prefix = _prefix(tokenizer, bos)
    text = corpus.text
    ids = _encode_enough(tokenizer, text, tokens - len(prefix))
    if len(prefix) + len(ids) < 2:  # noqa: PLR2004
        message = f"corpus {corpus.name!r} has {len(ids)} token(s): a perplexity needs at least 2"
        raise LabError(message)
    return TokenText(corpus.name, torch.tensor([prefix + ids]), bos, _target_bytes(tokenizer, ids, len(prefix)))


def _prefix(tokenizer: Any, bos: BosPolicy) -> list[int]:
    if bos == "none":
        return []
    if tokenizer.bos_token_id is None:
        message = "bos='add' needs a tokenizer with a BOS token, and this one has none: use bos='none'"
        raise LabError(message)
    return [tokenizer.bos_token_id]


def _encode_enough(tokenizer: Any, text: str, wanted: int) -> list[int]:
    """The first `wanted` ids, from a slice of the text that is long enough: a long text is not tokenised in vain."""
    length = (wanted + MARGIN) * CHARACTERS_PER_TOKEN
    while True:
        # verbose=False: a text longer than the model's trained length is the point here, not a mistake.
        ids: list[int] = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text) or len(ids) >= wanted + MARGIN:
            return ids[:wanted]
        length *= 2


def _target_bytes(tokenizer: Any, ids: list[int], prefix: int) -> int:
    """Bytes that the targets stand for; the first text token is a target only behind a BOS."""
    targets = ids if prefix else ids[1:]
    text: str = tokenizer.decode(targets, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", errors="replace"))
