"""From text to the token ids that every configuration is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.pieces import Pieces, encode_start
from sinkwindow_lab.records import BosPolicy, Documents, TokenizerRecord

if TYPE_CHECKING:
    from sinkwindow_lab.inputs.corpora import Corpus

LEAST = 2  # a perplexity needs a token and a target


@dataclass(frozen=True)
class TokenText:
    """A tokenized piece of a corpus.

    Attributes:
        corpus: the corpus' name.
        ids: [1, tokens], on the CPU; documents that are read apart are concatenated.
        bos: whether a BOS token was added before each document.
        text_bytes: UTF-8 bytes of the targets' text [bytes].
        documents: whether the documents are read as one text or each by a fresh session.
        lengths: tokens of each text that is read by a fresh session; empty means one text [tokens].
        tokenizer: the tokenizer of the ids.
    """

    corpus: str
    ids: torch.Tensor
    bos: BosPolicy
    text_bytes: int
    documents: Documents = "concat"
    lengths: tuple[int, ...] = ()
    tokenizer: TokenizerRecord | None = None

    @property
    def sha256(self) -> str:
        """Digest of the token ids (little-endian int64): equal digests mean the same targets."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def texts(self) -> tuple[torch.Tensor, ...]:
        """The texts that are each read by a fresh session, each [1, tokens]."""
        return torch.split(self.ids, list(self.lengths), dim=1) if self.lengths else (self.ids,)

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that are scored, in order, [targets]."""
        return torch.cat([text[0, 1:] for text in self.texts])


def encode(
    corpus: Corpus, tokenizer: Any, *, tokens: int, bos: BosPolicy = "none", documents: Documents = "concat"
) -> TokenText:
    """Tokenize the beginning of a corpus: `tokens` ids, BOS included, fewer if the text ends before.

    The tokenizer never adds special tokens; only this function adds BOS, so that there is at most one. `bos` set to
    `add` puts it before every text that is read by a fresh session. `documents` set to `concat` reads all documents as
    one text; `apart` reads each by a fresh session, and leaves out those of a single token, which have no target.

    Raises:
        LabError: if fewer than two tokens come out, `tokens` is below 2, or BOS is requested and there is none.
    """
    if tokens < LEAST:
        raise LabError(f"tokens={tokens} leaves nothing to predict: use 2 or more")
    prefix = _prefix(tokenizer, bos)
    texts = (corpus.text,) if documents == "concat" else corpus.documents
    rows, sizes = [], 0
    for ids, size in _encoded(texts, tokenizer, tokens, prefix):
        rows.append(ids)
        sizes += size
    if not rows:
        raise LabError(f"corpus {corpus.name!r} has no text of 2 tokens or more: a perplexity needs at least 2")
    lengths = () if documents == "concat" else tuple(map(len, rows))
    joined = torch.from_numpy(np.concatenate(rows))[None]
    return TokenText(corpus.name, joined, bos, sizes, documents, lengths, describe_tokenizer(tokenizer))


def describe_tokenizer(tokenizer: Any) -> TokenizerRecord:
    """Return the class, the size and the digest of the vocabulary of a Hugging Face tokenizer."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.sha256("\0".join(f"{word}\0{index}" for word, index in words).encode("utf-8", "surrogatepass"))
    return TokenizerRecord(kind=type(tokenizer).__name__, vocabulary=len(words), sha256=digest.hexdigest())


def _prefix(tokenizer: Any, bos: BosPolicy) -> list[int]:
    if bos == "none":
        return []
    if tokenizer.bos_token_id is None:
        raise LabError("bos='add' needs a tokenizer with a BOS token, and this one has none: use bos='none'")
    return [tokenizer.bos_token_id]


def _encoded(
    texts: tuple[str, ...], tokenizer: Any, tokens: int, prefix: list[int]
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], int]]:
    """Return the ids of each text that has a target, BOS first, and the bytes of its targets, up to `tokens` in all."""
    for text in texts:
        if tokens < LEAST:
            return
        found = encode_start(tokenizer, text, tokens - len(prefix))
        ids = np.concatenate((np.asarray(prefix, dtype=np.int64), found.ids))
        if len(ids) >= LEAST:
            tokens -= len(ids)
            yield ids, _target_bytes(tokenizer, text, found, with_first=bool(prefix))


def _target_bytes(tokenizer: Any, text: str, found: Pieces, *, with_first: bool) -> int:
    """Return the UTF-8 bytes of the targets; the first text token is a target only after a BOS."""
    if found.ends is None:
        behind: str = tokenizer.decode(found.ids[0 if with_first else 1 :].tolist(), clean_up_tokenization_spaces=False)
    else:
        behind = text[0 if with_first else int(found.ends[0]) : int(found.ends[-1])]
    return len(behind.encode("utf-8", errors="replace"))
