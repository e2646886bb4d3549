"""Exact perplexity: the same losses however the text is split, each target once, in bounded memory."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open

from lab_tiny import random_ids, random_text, refused, save_tiny, succeeded, tiny_model, tiny_tokenizer
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.tokens import TokenText, encode
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.ways.configurations import open_session, parse
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from pathlib import Path

    from sinkwindow_lab.records import Documents

EXACT = ("streaming_2_6_0", "streaming_2_6_3", "streaming_0_8_0", "window_0_8", "baseline", "recompute_8")
NAMES = (*EXACT, "stale_ranks_2_6_3", "eager_eviction_2_6_0", "absolute_2_6_3")


def words(*texts: str, tokens: int = 1000, documents: Documents = "concat") -> TokenText:
    """Return the tokens of these documents."""
    return encode(Corpus("words", texts, "test", joiner=" "), tiny_tokenizer(), tokens=tokens, documents=documents)


def starts(*counts: int) -> list[TokenText]:
    """Return the starts of one text, with these numbers of tokens."""
    return [words(random_text(90), tokens=count) for count in counts]


# -- the same losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 38, 39, 256])
def test_perplexity_is_token_weighted_whatever_the_blocks(block: int) -> None:
    """Unequal blocks change nothing: every target counts exactly once."""
    text = words(random_text(40))
    found = perplexity.measure(parse("baseline"), tiny_model(), text, block=block)
    logits = tiny_model()(input_ids=text.ids, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, text.ids[0, 1:], reduction="none")
    assert (found.nll.shape, found.nll.dtype) == ((39,), torch.float64)
    assert (found.nll - expected).abs().max() < 1e-9
    assert found.perplexity == pytest.approx(float(expected.mean().exp()))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("block", [2, 7, 64])
def test_blocks_give_the_losses_of_single_tokens(name: str, block: int) -> None:
    """They are equal for each target, across many evictions, with a buffer and without."""
    text = words(random_text(120))
    done: list[int] = []
    single = perplexity.measure(parse(name), tiny_model(), text, block=1)
    blocks = perplexity.measure(parse(name), tiny_model(), text, block=block, on_block=done.append)
    assert (single.nll - blocks.nll).abs().max() < 1e-9
    assert (single.block, blocks.block) == (1, block)
    assert (sum(done), max(done)) == (119, min(block, 119))


def test_streaming_is_dense_until_the_first_eviction() -> None:
    """Nothing is lost while everything fits: S + W + B + 1 tokens are seen before the first eviction."""
    dense, streaming = (
        perplexity.measure(parse(name), tiny_model(), words(random_text(60)), block=16).nll
        for name in ("baseline", "streaming_2_30_9")
    )
    assert (dense - streaming)[:42].abs().max() < 1e-5
    assert (dense - streaming)[42:].abs().max() > 1e-3


def test_the_arithmetic() -> None:
    """Mean, standard error of the mean, and bits per byte agree with a computation by hand; all are measurements."""
    text = words("w1 w2 w3")  # its targets are six bytes
    facts = {"seconds": 4.0, "evictions": 3.0, "kept_tokens": 2.0, "cache_bytes": 8.0}
    found = perplexity.Score("baseline", text, 256, torch.tensor([1.0, 3.0], dtype=torch.float64), facts)
    by_name = found.figures_by_name()
    assert (by_name["NLL"], found.perplexity, by_name["tokens_per_second"]) == (2.0, math.exp(2.0), 0.5)
    assert by_name["standard_error"] == pytest.approx(1.0)  # standard deviation sqrt(2), two targets
    assert by_name["bits_per_byte"] == pytest.approx(4.0 / math.log(2) / 6)
    made = found.measurements("a part")
    assert {(one.part, one.subject, one.configuration, one.at) for one in made} == {("a part", "words", "baseline", 3)}
    shown = {one.metric: one.samples[0] for one in made}
    assert (shown["PPL"], shown["NLL"], shown["targets"], shown["kept"]) == (math.exp(2.0), 2.0, 2, 2)
    assert by_name["bits_per_byte"] == shown["bits per byte"]


def test_all_configurations_have_the_same_targets() -> None:
    """They differ in what they remember only."""
    text = words(random_text(50), tokens=41)
    found = {name: perplexity.measure(parse(name), tiny_model(), text) for name in NAMES}
    assert {len(one.nll) for one in found.values()} == {40}
    assert found["streaming_2_6_3"].facts["evictions"] == 8
    assert all(one.facts["seconds"] > 0 for one in found.values())


# -- documents --------------------------------------------------------------------------------------------------------


def test_unequal_texts_are_weighted_by_their_targets() -> None:
    """PPL is exp(total loss / targets): texts of 2 and of 31 tokens have different weights."""
    text = words("w1 w2", random_text(31), documents="apart")
    found = perplexity.measure(parse("baseline"), tiny_model(), text)
    parts = [perplexity.token_losses(open_session(parse("baseline"), tiny_model()), one) for one in text.texts]
    assert [len(one) for one in parts] == [1, 30]
    total = sum(float(one.sum()) for one in parts)
    assert found.perplexity == pytest.approx(math.exp(total / 31), rel=1e-12)
    means = sum(math.exp(float(one.mean())) for one in parts) / 2
    assert abs(found.perplexity - means) > 1e-3


def test_documents_apart_start_afresh() -> None:
    """Each document has a new cache, so its score does not depend on its place; evictions are added up."""
    one = random_text(40)
    found = perplexity.measure(parse("streaming_2_6_3"), tiny_model(), words(one, one, documents="apart"), block=7)
    assert torch.equal(found.nll[:39], found.nll[39:])
    assert (len(found.nll), found.facts["evictions"]) == (78, 2 * 7)
    assert len(perplexity.measure(parse("baseline"), tiny_model(), words(one, one)).nll) == 79


# -- several lengths in one reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if not parse(name).depends_on_calls])
def test_one_reading_scores_every_length_as_if_read_alone(name: str) -> None:
    """Lengths before and after evictions and ends of blocks have the same losses and facts, except for the time."""
    found = list(perplexity.measure_stages(parse(name), tiny_model(), texts := starts(2, 9, 30, 41, 80), block=7))
    for text, stage in zip(texts, found, strict=True):
        alone = perplexity.measure(parse(name), tiny_model(), text, block=7)
        assert (stage.nll - alone.nll).abs().max() < 1e-9
        assert (stage.text, stage.block) == (text, 7)
        if parse(name).kind in ("baseline", "streaming", "window"):  # what the others store depends on the last call
            assert {**stage.facts, "seconds": 0} == {**alone.facts, "seconds": 0}
    seconds = [one.facts["seconds"] for one in found]
    assert seconds == sorted(set(seconds)), "each time must be the time since the start"


def test_what_depends_on_calls_is_scored_one_length_at_a_time() -> None:
    """Rules that depend on calls score differently if calls end elsewhere, so each length is measured by itself."""
    dependent = [name for name in (*NAMES, "call_2_6") if parse(name).depends_on_calls]
    assert dependent == ["eager_eviction_2_6_0", "call_2_6"]
    short, long = starts(30, 60)
    for name in ("call_2_6", "eager_eviction_2_6_4"):
        with pytest.raises(LabError, match="measure each length separately"):
            next(perplexity.measure_stages(parse(name), tiny_model(), [short, long]))
        session = open_session(parse(name), tiny_model())
        parts = [perplexity.token_losses(session, ids, block=7) for ids in (short.ids, long.ids[:, 29:])]
        alone = perplexity.measure(parse(name), tiny_model(), long, block=7).nll
        assert (torch.cat(parts) - alone).abs().max() > 1e-3


def test_stages_must_be_starts_of_one_text() -> None:
    """Otherwise losses of one text would be reported for another."""
    other = words(random_text(40, seed=9), tokens=20)
    short, long = starts(20, 30)
    for pair in ([other, long], [long, short], [short, short]):
        with pytest.raises(LabError, match="are not the start of"):
            next(perplexity.measure_stages(parse("baseline"), tiny_model(), pair))


# -- limits -----------------------------------------------------------------------------------------------------------


class NarrowSession(Session):
    """A session that records its longest call and predicts all words with equal probability."""

    def __init__(self, value: float = 0.0) -> None:
        self.longest, self._value = 0, value

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert not last_only
        self.longest = max(self.longest, ids.shape[1])
        return torch.full((1, ids.shape[1], 32), self._value)

    @property
    def kept_tokens(self) -> int:
        """Return 0, since nothing is kept."""
        return 0


def test_logits_are_never_more_than_a_block() -> None:
    """A million tokens are fed in calls of a block, and only a float64 per target is returned."""
    session = NarrowSession()
    losses = perplexity.token_losses(session, torch.zeros((1, 1_000_001), dtype=torch.long), block=4096)
    assert session.longest == 4096
    assert losses.untyped_storage().nbytes() == 8 * 1_000_000
    assert float(losses.mean()) == pytest.approx(math.log(32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_an_error(value: float) -> None:
    """The error names the target and what to try; there is never a perplexity of NaN."""
    with pytest.raises(LabError, match=r"target 0 is nan.*float32"):
        perplexity.token_losses(NarrowSession(value), random_ids(9), block=4)


@pytest.mark.parametrize(("block", "count"), [(0, 5), (-1, 5), (4, 1)])
def test_nothing_to_score_is_an_error(block: int, count: int) -> None:
    """Blocks of no token and texts without a target are refused."""
    with pytest.raises(LabError, match="or more"):
        perplexity.token_losses(NarrowSession(), random_ids(count), block=block)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and a text."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "long.txt").write_text(random_text(300), encoding="utf-8")
    return path


def command(folder: Path, *options: object) -> tuple[object, ...]:
    """Return the arguments of the command."""
    return ("perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)


def test_both_methods_print_the_same_and_their_ratio(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the same digits of PPL for both, and how much faster blocks are."""
    options = ("--tokens", 200, "--sinks", 2, "--window", 30, "--buffer", 5, "--method", "both")
    out, _ = succeeded(capsys, *command(folder, *options))
    single, blocks, ratio = out.splitlines()
    assert single.split()[:2] == blocks.split()[:2]
    assert "1 tok/call" in single
    assert "times as fast" in ratio


def test_losses_are_saved_with_what_they_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has a float64 per target for each method, the targets, and the records as JSON in its metadata."""
    options = ("--tokens", 80, "--config", "streaming_2_6_3", "--method", "both", "--json")
    out, _ = succeeded(capsys, *command(folder, *options, "--save-nll", tmp_path / "a.safetensors"))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        losses = {name: file.get_tensor(name) for name in ("nll_token", "nll_blocks")}
        assert file.get_tensor("targets").shape == (79,)
        assert file.get_tensor("lengths").tolist() == [80]
        head = json.loads(file.metadata()["records"])
    assert (losses["nll_token"] - losses["nll_blocks"]).abs().max() < 1e-4
    assert head == json.loads(out)
    assert float(losses["nll_blocks"].mean()) == pytest.approx(head["result"]["NLL"])


def test_a_file_that_cannot_be_written_is_refused_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is one line and comes before a model is loaded."""
    assert "--save-nll" in refused(capsys, *command(folder, "--save-nll", "/nowhere/a.safetensors"))
