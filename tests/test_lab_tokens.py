"""From text to tokens: counts, BOS, documents, and prefixes that give the ids of the whole."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from lab_tiny import random_text, tiny_tokenizer
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import tokens
from sinkwindow_lab.inputs.corpora import Corpus


def words(*texts: str) -> Corpus:
    """Return a corpus of these documents."""
    return Corpus("words", texts, "test", joiner=" ")


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_encoding_starts_at_the_beginning_and_counts_bytes() -> None:
    """The ids are the first tokens of the text, and the bytes are those of all but the first token."""
    text = tokens.encode(words("w1 w2 w29 w3"), tiny_tokenizer(), tokens=3)
    assert text.ids.tolist() == [[3, 4, 31]]
    assert text.text_bytes == len(" w2 w29")


def test_bos_comes_once_and_only_when_asked_for() -> None:
    """With BOS the first word is a target too, in front of each document that is read apart."""
    text = tokens.encode(words("w1 w2 w3"), tiny_tokenizer(), tokens=3, bos="add")
    assert (text.ids.tolist(), text.text_bytes) == ([[0, 3, 4]], len("w1 w2"))
    assert 0 not in tokens.encode(words("w1 w2 w3"), tiny_tokenizer(), tokens=3).ids
    apart = tokens.encode(words("w1", "w2 w3"), tiny_tokenizer(), tokens=9, bos="add", documents="apart")
    assert (apart.ids.tolist(), apart.lengths) == ([[0, 3, 0, 4, 5]], (2, 3))


def test_documents_without_a_target_are_left_out() -> None:
    """Empty and one-token documents are skipped; the last document is cut at the limit."""
    text = tokens.encode(words("", "w1", "w2 w3", " ", "w4 w5 w6"), tiny_tokenizer(), tokens=4, documents="apart")
    assert text.lengths == (2, 2)
    assert text.targets.tolist() == [5, 7]
    assert text.text_bytes == len(" w3") + len(" w5")
    with pytest.raises(LabError, match="at least 2"):
        tokens.encode(words("w1", "w2"), tiny_tokenizer(), tokens=9, documents="apart")


@pytest.mark.parametrize(("text", "count", "message"), [("w1", 5, "at least 2"), ("w1 w2", 1, "use 2 or more")])
def test_too_little_text_is_an_error(text: str, count: int, message: str) -> None:
    """A perplexity needs a token and a target."""
    with pytest.raises(LabError, match=message):
        tokens.encode(words(text), tiny_tokenizer(), tokens=count)


def test_records_say_what_was_read() -> None:
    """Counts, digest and tokenizer are in the record; equal digests mean equal tokens."""
    text = tokens.encode(words("w1 w2", random_text(8)), tiny_tokenizer(), tokens=9, documents="apart")
    record = text.record()
    assert (record.corpus, record.tokens, record.targets, record.texts) == ("words", 9, 7, 2)
    assert (record.bos, record.documents, record.target_bytes) == ("none", "apart", text.text_bytes)
    assert record.tokenizer is not None
    assert (record.tokenizer.vocabulary, len(record.tokenizer.sha256)) == (32, 64)
    joined = tokens.encode(words("w1 w2", random_text(8)), tiny_tokenizer(), tokens=9)
    assert joined.record().sha256 == record.sha256
    assert tokens.encode(words(random_text(9)), tiny_tokenizer(), tokens=9).record().sha256 != record.sha256


class SlowTokenizer:
    """A tokenizer without offsets."""

    is_fast = False

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return the ids of the words."""
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the words."""
        return " ".join(f"w{one}" for one in ids)

    def get_vocab(self) -> dict[str, int]:
        """Return no words."""
        return {}


def test_tokenizers_without_offsets_work_too() -> None:
    """The bytes are those of the decoded targets then."""
    text = tokens.encode(words("w1 w22 w3"), SlowTokenizer(), tokens=2)
    assert (text.ids.tolist(), text.text_bytes) == ([[1, 22]], len("w22"))


# -- prefixes ---------------------------------------------------------------------------------------------------------


def fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")  # type: ignore[no-untyped-call] # noqa: S106


def byte_pairs() -> PreTrainedTokenizerFast:
    """Return byte pairs inside words, as GPT-2 has them."""
    core = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([scrambled(seed) for seed in range(3)], trainer)
    return fast(core)


def across_words() -> PreTrainedTokenizerFast:
    """Return a vocabulary whose pieces contain spaces, so that a token depends on several words around it."""
    draw = random.Random(1)  # noqa: S311 - no secret
    pieces = ["".join(one) for length in range(1, 6) for one in itertools.product("ab \n", repeat=length)]
    scores = [(piece, -2.0 - draw.random() * (1 + len(piece))) for piece in pieces]
    return fast(Tokenizer(kinds.Unigram([("<unk>", -20.0), *scores], unk_id=0, byte_fallback=False)))


def long_words() -> PreTrainedTokenizerFast:
    """Return a vocabulary that knows a word of any length only as a whole: one letter more changes its first token."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "##a": 3, "##b": 4}
    core = Tokenizer(kinds.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=3_000))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(core)


TOKENIZERS = {"words": tiny_tokenizer, "BPE": byte_pairs, "across words": across_words, "long words": long_words}


def scrambled(seed: int) -> str:
    """Return words of any length, runs of spaces, and numbers."""
    draw = random.Random(seed)  # noqa: S311
    parts = [
        draw.choice(["a", "b", "ab", "ba a", "w1", str(draw.random()), "é漢字。", " \n"]) * draw.choice([1, 1, 1, 2, 9])
        for _ in range(4_000)
    ]
    return " ".join(parts[:2_000]) + "ab" * 3_000 + " ".join(parts[2_000:])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("guess", [1, 6])
def test_prefixes_give_the_ids_of_the_whole(name: str, guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the prefixes are cut, ids and bytes are those of one pass over the whole text."""
    monkeypatch.setattr(tokens, "CHARACTERS_PER_TOKEN", guess)
    tokenizer = TOKENIZERS[name]()
    for text in (scrambled(7), "ab" * 9_000, "w1 " + "x" * 9_000 + " w2", "w1" + " " * 9_000 + "w2", "ab " * 4_000):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in whole["offset_mapping"]]
        for wanted in [*range(2, 60), 300, 999, 2_500, 100_000] if len(ends) > 1 else []:
            found = tokens.encode(words(text), tokenizer, tokens=wanted)
            assert found.ids[0].tolist() == whole["input_ids"][:wanted], (text[:20], wanted)
            assert found.text_bytes == len(text[ends[0] : ends[:wanted][-1]].encode())


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the lengths of all texts that are tokenized."""
    found, tokenize = list[int](), PreTrainedTokenizerFast.__call__

    def watched(self: PreTrainedTokenizerFast, text: Any, *arguments: Any, **options: Any) -> Any:
        found.append(len(text))
        return tokenize(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    return found


def test_only_what_is_needed_of_a_long_text_is_tokenized(lengths: list[int]) -> None:
    """The longest text that the tokenizer gets is a small multiple of what is wanted, also with long tokens."""
    tokenizer = tiny_tokenizer()
    for word, bound in (("w1 ", 15_000), ("w1" + " " * 60, 300_000)):
        lengths.clear()
        assert tokens.encode(words(word * (10_000_000 // len(word))), tokenizer, tokens=2_000).ids.shape == (1, 2_000)
        assert max(lengths) < bound


@pytest.mark.parametrize("first", ["w1 ", "w1" + " " * 30, "x" * 300 + " "])
def test_long_texts_are_tokenized_by_a_guess_from_their_start(
    first: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little more than what is needed, if the start is like the rest; if it is not, the same tokens."""
    monkeypatch.setattr(tokens, "SAMPLE", 1_000)
    text, tokenizer = first * (3_000 // len(first)) + random_text(60_000), tiny_tokenizer()
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    lengths.clear()
    found = tokens.encode(words(text), tokenizer, tokens=30_000)
    assert found.ids[0].tolist() == whole[:30_000]
    needed = len(" ".join(text.split(" ")[:30_000]))
    assert max(lengths) < (1.2 if first == "w1 " else 2.5) * needed
