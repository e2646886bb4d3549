"""Tokenize a long text piece by piece: the ids of the whole, in the memory of one piece.

A tokenizer's own record of a text (offsets, words, masks) is a hundred times the size of the ids. Pieces overlap, and
are joined where both have the same tokens for some length: a token depends on its neighborhood only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 18  # characters tokenized at once
OVERLAP = 1 << 12  # characters that two pieces share
AGREE = 16  # tokens that must be equal before a seam
CHARACTERS_PER_TOKEN = 8  # a first guess, so that no more of a long text is tokenized than needed
MARGIN = 256  # tokens before a piece's end that may depend on what follows: not used where the text goes on


@dataclass(frozen=True)
class Pieces:
    """Tokens of a text's beginning.

    Attributes:
        ids: [tokens], int64.
        ends: [tokens], int64, where each token ends in the text [characters]; None if the tokenizer has no offsets.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64] | None

    def start(self, count: int) -> Pieces:
        """Return the first `count` tokens."""
        return Pieces(self.ids[:count], None if self.ends is None else self.ends[:count])


def encode_start(tokenizer: Any, text: str, wanted: int) -> Pieces:
    """Tokenize the beginning of a text, without special tokens, as if the whole text had been tokenized at once.

    Returns `wanted` tokens, fewer if the text ends before.
    """
    if not getattr(tokenizer, "is_fast", False):  # no offsets, so no seams
        return _encode(tokenizer, text, 0, len(text)).start(wanted)
    size = min(PIECE, (wanted + MARGIN) * CHARACTERS_PER_TOKEN)
    size = max(size, 2 * OVERLAP)
    done = _encode(tokenizer, text, 0, size)
    found, count, stop = [done], len(done.ids), size
    while stop < len(text) and count < wanted + MARGIN:
        start, stop = stop - OVERLAP, stop - OVERLAP + PIECE
        following = _encode(tokenizer, text, start, stop)
        seam = _seam(found[-1], following, start)
        if seam is None:  # no safe place, such as in one endless word
            return _encode(tokenizer, text, 0, len(text)).start(wanted)
        found[-1], following = found[-1].start(seam[0]), _after(following, seam[1])
        found.append(following)
        count = sum(len(one.ids) for one in found)
    ends = [one.ends for one in found if one.ends is not None]
    return Pieces(np.concatenate([one.ids for one in found]), np.concatenate(ends)).start(wanted)


def _encode(tokenizer: Any, text: str, start: int, stop: int) -> Pieces:
    """Return the tokens of a slice; ends count from the start of the whole text."""
    fast = getattr(tokenizer, "is_fast", False)
    # verbose=False: a text longer than the model's trained length is intended here.
    found = tokenizer(
        text[start:stop],
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        **({"return_offsets_mapping": True} if fast else {}),
    )
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    if not fast:
        return Pieces(ids, None)
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Pieces(ids, offsets[:, 1] + start)


def _after(pieces: Pieces, count: int) -> Pieces:
    return Pieces(pieces.ids[count:], None if pieces.ends is None else pieces.ends[count:])


def _seam(left: Pieces, right: Pieces, start: int) -> tuple[int, int] | None:
    """Return how many tokens to take of the left piece and to skip of the right one; None without a safe place."""
    if left.ends is None or right.ends is None:
        return None
    low, high = start + OVERLAP // 4, start + 3 * OVERLAP // 4  # both pieces contain the neighborhood here
    places = {int(end): index for index, end in enumerate(right.ends) if end <= high}
    first = int(np.searchsorted(left.ends, low))
    last = int(np.searchsorted(left.ends, high, side="right"))
    for index in range(last - 1, first - 1, -1):
        other = places.get(int(left.ends[index]), -1)
        if min(index, other) + 1 >= AGREE and _equal_before(left, right, index, other):
            return index + 1, other + 1
    return None


def _equal_before(left: Pieces, right: Pieces, index: int, other: int) -> bool:
    """Return whether the tokens up to both places are equal for long enough, and the next ones as well."""
    ours = left.ids[index + 1 - AGREE : index + 2]
    theirs = right.ids[other + 1 - AGREE : other + 2]
    return bool(np.array_equal(ours, theirs))
