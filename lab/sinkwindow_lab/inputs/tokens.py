"""From text to the token ids that every configuration is scored on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.records import BosPolicy, Documents, TextRecord, TokenizerRecord

if TYPE_CHECKING:
    from sinkwindow_lab.inputs.corpora import Corpus

LEAST = 2  # a perplexity needs a token and a target
CHARACTERS_PER_TOKEN = 6  # a first guess at how much of a text is needed
SAMPLE = 200_000  # characters that give a better guess for texts of many times this length
MARGIN = 256  # last tokens of a prefix, which may depend on what follows
BOUNDARY = re.compile(r"\s\S|\u3002")  # start of a word, or an ideographic full stop: such scripts have no spaces


@dataclass(frozen=True)
class TokenText:
    """A tokenized piece of a corpus."""

    corpus: str
    ids: torch.Tensor  # [1, tokens], on the CPU; documents that are read apart are concatenated
    bos: BosPolicy
    text_bytes: int  # UTF-8 bytes of the targets' text
    documents: Documents = "concat"
    lengths: tuple[int, ...] = ()  # tokens of each text that is read by a fresh session; empty means one text
    tokenizer: TokenizerRecord | None = None
    bos_id: int | None = None  # the token in front of each text
    requested: int | None = None  # tokens that were asked for
    model: str | None = None  # whose tokenizer made them

    @property
    def sha256(self) -> str:
        """Digest of the token ids (little-endian int64): equal digests mean the same targets."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def texts(self) -> tuple[torch.Tensor, ...]:
        """The texts that are each read by a fresh session, each [1, tokens]."""
        return torch.split(self.ids, list(self.lengths), dim=1) if self.lengths else (self.ids,)

    @property
    def pieces(self) -> tuple[TokenText, ...]:
        """Those texts as texts of their own; the bytes of each are not known."""
        apart = (replace(self, ids=ids, lengths=(), text_bytes=0) for ids in self.texts)
        return tuple(apart) if self.lengths else (self,)

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that are scored, in order, [targets]."""
        return torch.cat([text[0, 1:] for text in self.texts])

    def record(self) -> TextRecord:
        """Return what identifies the tokens."""
        names = ("corpus", "sha256", "bos", "documents", "tokenizer", "bos_id", "requested", "model")
        counts: dict[str, Any] = {"tokens": self.ids.shape[1], "targets": len(self.targets), "texts": len(self.texts)}
        return TextRecord(**{name: getattr(self, name) for name in names}, **counts, target_bytes=self.text_bytes)


def encode(
    corpus: Corpus, tokenizer: Any, *, tokens: int, bos: BosPolicy = "none", documents: Documents = "concat"
) -> TokenText:
    """Tokenize the beginning of a corpus: `tokens` ids, BOS included, fewer if the text ends before.

    The tokenizer never adds special tokens; only this function adds BOS, so that there is at most one. `bos` set to
    `add` puts it before every text that is read by a fresh session. `documents` set to `concat` reads all documents as
    one text; `apart` reads each by a fresh session, and leaves out those of a single token, which have no target.
    """
    if tokens < LEAST:
        raise LabError(f"tokens={tokens} leaves nothing to predict: use 2 or more")
    if bos == "add" and tokenizer.bos_token_id is None:
        raise LabError("bos='add' needs a tokenizer with a BOS token, and this one has none: use bos='none'")
    prefix: list[int] = [tokenizer.bos_token_id] if bos == "add" else []
    rows: list[list[int]] = []
    text_bytes, left = 0, tokens
    for text in (corpus.text,) if documents == "concat" else corpus.documents:
        if left < LEAST:
            break
        ids, ends = _tokenize(tokenizer, text, left - len(prefix))
        if len(prefix) + len(ids) >= LEAST:
            rows.append(prefix + ids)
            left -= len(rows[-1])
            first = 0 if prefix else 1  # the first token of a text is a target only after a BOS
            if ends is None:
                scored = tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
            else:
                scored = text[ends[0] if first else 0 : ends[-1]]
            text_bytes += len(scored.encode("utf-8", errors="replace"))
    if not rows:
        raise LabError(f"corpus {corpus.name!r} has no text of 2 tokens or more: a perplexity needs at least 2")
    lengths = () if documents == "concat" else tuple(map(len, rows))
    joined = torch.tensor([token for row in rows for token in row])[None]
    kept = lengths, describe_tokenizer(tokenizer), (*prefix, None)[0], tokens
    return TokenText(corpus.name, joined, bos, text_bytes, documents, *kept)


def describe_tokenizer(tokenizer: Any) -> TokenizerRecord:
    """Return the class, the size and the digest of the vocabulary of a Hugging Face tokenizer."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.sha256("\0".join(f"{word}\0{index}" for word, index in words).encode("utf-8", "surrogatepass"))
    return TokenizerRecord(kind=type(tokenizer).__name__, vocabulary=len(words), sha256=digest.hexdigest())


def _tokenize(tokenizer: Any, text: str, wanted: int) -> tuple[list[int], list[int] | None]:
    """Return the first tokens of a text as if all of it were tokenized, and where each ends [characters].

    Only a prefix is tokenized, lengthened until it is enough: a tokenizer's result takes a hundred times the memory of
    the ids. Tokens are used if they end `MARGIN` tokens and a word's start before the prefix does. Without either,
    such as in one endless word, the whole text is tokenized; so it is if the tokenizer does not say where tokens end.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    size = _guess(tokenizer, text, wanted + MARGIN) if fast else len(text)
    while True:
        # verbose=False: a text longer than the model's trained length is intended here.
        found = tokenizer(
            text[:size],
            add_special_tokens=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=fast,
        )
        ids: list[int] = found["input_ids"][:wanted]
        ends = [end for _, end in found["offset_mapping"][:wanted]] if fast else None
        enough = len(found["input_ids"]) >= wanted + MARGIN
        if size >= len(text) or (enough and ends and BOUNDARY.search(text, ends[-1], size)):
            return ids, ends
        size += size // 4 if size > SAMPLE else size


def _guess(tokenizer: Any, text: str, wanted: int) -> int:
    """Return how much of a text has about so many tokens [characters]."""
    size = wanted * CHARACTERS_PER_TOKEN
    if min(size, len(text)) < 10 * SAMPLE:
        return size
    known = len(tokenizer(text[:SAMPLE], add_special_tokens=False, verbose=False)["input_ids"])
    return min(size, wanted * SAMPLE * 21 // (20 * max(known, 1)))  # 5% more, to need one pass only
