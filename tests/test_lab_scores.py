"""The arithmetic of perplexity, and the tokens that it is computed over."""

from __future__ import annotations

import math

import pytest
import torch

from lab_tiny import random_ids, random_text, tiny_model, tiny_tokenizer
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import open_session

NAMES = (
    "baseline",
    "streaming_2_6_3",
    "window_0_8",
    "recompute_8",
    "stale_ranks_2_6_3",
    "eager_eviction_2_6_0",
    "absolute_2_6_3",
)


# -- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 38, 39, 256])
def test_perplexity_is_token_weighted_whatever_the_blocks(block: int) -> None:
    """Unequal blocks change nothing: every target counts exactly once."""
    ids = random_ids(40)
    losses = perplexity.token_losses(open_session(parse("baseline"), tiny_model()), ids, block=block)
    logits = tiny_model()(input_ids=ids, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses.shape == (39,)
    assert losses.dtype == torch.float64
    assert (losses - expected).abs().max() < 1e-9
    assert perplexity.summarise(losses, 80)["perplexity"] == pytest.approx(float(expected.mean().exp()))


def test_summary_arithmetic() -> None:
    """Mean, standard error of the mean, and bits per byte agree with a computation by hand."""
    found = perplexity.summarise(torch.tensor([1.0, 3.0], dtype=torch.float64), text_bytes=4)
    assert found["mean_nll"] == 2.0
    assert found["perplexity"] == math.exp(2.0)
    assert found["standard_error"] == pytest.approx(1.0)  # standard deviation sqrt(2), two targets
    assert found["bits_per_byte"] == pytest.approx(4.0 / math.log(2) / 4)


def test_record_says_what_was_scored() -> None:
    """Counts and a digest are in the record; all configurations have the same targets."""
    text = tokens.encode(Corpus("words", (random_text(50),), "test"), tiny_tokenizer(), tokens=41)
    found = [perplexity.measure(parse(name), tiny_model(), text).record for name in NAMES]
    assert {one.targets for one in found} == {40}
    assert len({one.targets_sha256 for one in found}) == 1
    assert next(one for one in found if one.configuration == "streaming_2_6_3").evictions == 8
    assert all(one.tokens_per_second > 0 for one in found)


def starts(*counts: int) -> list[tokens.TokenText]:
    """Return the starts of one text, with these numbers of tokens."""
    corpus = Corpus("words", (random_text(90),), "test")
    return [tokens.encode(corpus, tiny_tokenizer(), tokens=count) for count in counts]


@pytest.mark.parametrize("name", [name for name in NAMES if not parse(name).depends_on_calls])
def test_one_reading_scores_every_length_as_if_read_alone(name: str) -> None:
    """Lengths before and after evictions and ends of blocks have the same record, except for the time."""
    texts = starts(2, 9, 30, 41, 80)
    found = perplexity.measure_stages(parse(name), tiny_model(), texts, block=7)
    for text, stage in zip(texts, found, strict=True):
        alone = perplexity.measure(parse(name), tiny_model(), text, block=7)
        assert (stage.nll - alone.nll).abs().max() < 1e-9
        exact = {"seconds", "tokens_per_second", "perplexity", "mean_nll", "standard_error", "bits_per_byte"}
        if parse(name).kind in ("baseline", "streaming", "window"):  # what the others store depends on the last call
            assert stage.record.model_dump(exclude=exact) == alone.record.model_dump(exclude=exact)
        assert stage.record.perplexity == pytest.approx(alone.record.perplexity, rel=1e-9)
    seconds = [one.record.seconds for one in found]
    assert seconds == sorted(set(seconds)), "each time must be the time since the start"


def test_what_depends_on_calls_is_scored_one_length_at_a_time() -> None:
    """Rules that depend on calls score differently if calls end elsewhere, so each length is measured by itself."""
    dependent = [name for name in (*NAMES, "call_2_6") if parse(name).depends_on_calls]
    assert dependent == ["eager_eviction_2_6_0", "call_2_6"]
    short, long = starts(30, 60)
    for name in ("call_2_6", "eager_eviction_2_6_4"):
        with pytest.raises(LabError, match="measure each length separately"):
            perplexity.measure_stages(parse(name), tiny_model(), [short, long])
        session = open_session(parse(name), tiny_model())
        parts = [perplexity.token_losses(session, ids, block=7) for ids in (short.ids, long.ids[:, 29:])]
        alone = perplexity.measure(parse(name), tiny_model(), long, block=7).nll
        assert (torch.cat(parts) - alone).abs().max() > 1e-3


def test_stages_must_be_starts_of_one_text() -> None:
    """Otherwise losses of one text would be reported for another."""
    other = tokens.encode(Corpus("other", (random_text(40, seed=9),), "test"), tiny_tokenizer(), tokens=20)
    short, long = starts(20, 30)
    for pair in ([other, long], [long, short], [short, short]):
        with pytest.raises(LabError, match="are not the start of"):
            perplexity.measure_stages(parse("baseline"), tiny_model(), pair)


@pytest.mark.parametrize(("block", "count"), [(0, 5), (-1, 5), (4, 1)])
def test_nothing_to_score_is_an_error(block: int, count: int) -> None:
    """Blocks of no token and texts without a target are refused."""
    with pytest.raises(LabError, match="or more"):
        perplexity.token_losses(open_session(parse("baseline"), tiny_model()), random_ids(count), block=block)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_encoding_starts_at_the_beginning_and_counts_bytes() -> None:
    """The ids are the first tokens of the text, and the bytes are those of all but the first token."""
    text = tokens.encode(Corpus("words", ("w1 w2 w29 w3",), "test"), tiny_tokenizer(), tokens=3)
    assert text.ids.tolist() == [[3, 4, 31]]
    assert text.text_bytes == len(" w2 w29")


def test_bos_comes_once_and_only_when_asked_for() -> None:
    """With BOS the first word is a target too."""
    corpus = Corpus("words", ("w1 w2 w3",), "test")
    text = tokens.encode(corpus, tiny_tokenizer(), tokens=3, bos="add")
    assert text.ids.tolist() == [[0, 3, 4]]
    assert text.text_bytes == len("w1 w2")
    assert 0 not in tokens.encode(corpus, tiny_tokenizer(), tokens=3).ids


def test_long_texts_are_not_cut_short() -> None:
    """If there are more characters per token than expected, a longer slice is taken."""
    corpus = Corpus("words", (" ".join(["w1" + " " * 60] * 900),), "test")
    assert tokens.encode(corpus, tiny_tokenizer(), tokens=600).ids.shape == (1, 600)


@pytest.mark.parametrize(("text", "count", "message"), [("w1", 5, "at least 2"), ("w1 w2", 1, "use 2 or more")])
def test_too_little_text_is_an_error(text: str, count: int, message: str) -> None:
    """A perplexity needs a token and a target."""
    with pytest.raises(LabError, match=message):
        tokens.encode(Corpus("words", (text,), "test"), tiny_tokenizer(), tokens=count)
