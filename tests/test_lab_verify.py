"""`verify` finds the cache right on every kind of model, and finds a fault in it, whatever its kind."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import families
from lab_tiny import random_ids, random_text, refused, run, save_tiny, succeeded, tiny_model, tiny_tokenizer
from sinkwindow import StreamingCache
from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.verify import Verdict, call_lengths, verify
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.ways.configurations import streaming

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RULE = streaming(2, 6, 1)
OPTIONS = ("--sinks", 2, "--window", 6, "--buffer", 1, "--tokens", 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and a text."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "text.txt").write_text(random_text(100), encoding="utf-8")
    return path


def command(folder: Path, *more: object) -> tuple[object, ...]:
    """Return the arguments of `sinkwindow verify`."""
    return ("verify", "--model", folder, "--corpus", folder / "text.txt", *OPTIONS, *more)


# -- faults --------------------------------------------------------------------------------------------------------


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Rotate the sinks one position too far."""
    right = Rotary.cos_sin

    def wrong(self: Rotary, distance: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return right(self, distance + 1, device, dtype)

    patch.setattr(Rotary, "cos_sin", wrong)


def another_token_dropped(patch: pytest.MonkeyPatch) -> None:
    """Evict one token more, later."""

    def make(model: Any, num_sinks: int, window: int, buffer: int) -> StreamingCache:
        return StreamingCache(model, num_sinks, window - 1, buffer + 1)

    patch.setattr("sinkwindow.StreamingCache", make)


def one_slot_of_a_layer_spoilt(patch: pytest.MonkeyPatch) -> None:
    """Add a little to one value, of one token in one layer."""
    _change_values(patch, lambda values, layer, seen: values + (1e-3 if (layer, seen) == (1, 40) else 0))


def low_precision(patch: pytest.MonkeyPatch) -> None:
    """Keep float32 values in bfloat16: in float64 nothing is wrong."""
    _change_values(patch, lambda values, *_: values.bfloat16().float() if values.dtype == torch.float32 else values)


def not_a_number(patch: pytest.MonkeyPatch) -> None:
    """Give a NaN, once."""
    _change_values(patch, lambda values, layer, seen: values * (torch.nan if (layer, seen) == (0, 50) else 1))


def _change_values(patch: pytest.MonkeyPatch, change: Any) -> None:
    right = StreamingCache.update

    def wrong(self: StreamingCache, key: Tensor, value: Tensor, layer: int, **more: Any) -> tuple[Tensor, Tensor]:
        return right(self, key, change(value, layer, self.seen_tokens[0]), layer, **more)

    patch.setattr(StreamingCache, "update", wrong)


FAULTS = {
    # In the order: of the lists, in float64, in the model's own dtype.
    off_by_one: (False, True, True),
    another_token_dropped: (True, True, True),
    one_slot_of_a_layer_spoilt: (False, True, True),
    low_precision: (False, False, True),
    not_a_number: (False, True, True),
}


@pytest.mark.parametrize(("plant", "shows"), FAULTS.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_a_wrong_cache_is_found(plant: Any, shows: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with a fault is wrong, and the verdict says by what it shows."""
    plant(monkeypatch)
    found = verify(tiny_model(torch.float32), random_ids(60), RULE)
    assert not found.right
    assert found.own is not None
    assert (found.lists_differ_after is not None, not found.double.right, not found.own.right) == shows
    assert str(found).endswith("verdict: WRONG")


def test_the_layer_of_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are those after each layer: before the faulty one there are none."""
    one_slot_of_a_layer_spoilt(monkeypatch)
    before, after = verify(tiny_model(torch.float32), random_ids(60), RULE).double.layers
    assert before < 1e-12
    assert after > 1e-6


def test_lists_alone_can_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cache says that it keeps is compared after each call."""
    monkeypatch.setattr(StreamingCache, "retained_tokens", property(lambda self: [[0, *range(self.seen_tokens[0])]]))
    found = verify(tiny_model(torch.float32), random_ids(60), RULE, call_length=7)
    assert (found.right, found.double.right, found.lists_differ_after) == (False, True, 7)


# -- right caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "gemma2", "bloom", "mixtral"])
def test_the_cache_is_right_on_every_kind_of_model(name: str) -> None:
    """In float64 errors stay at 1e-12, also where transformers computes norms or softmaxes in float32."""
    model = copy.deepcopy(families.build(name))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for module in model.modules():
        vars(module).pop("forward", None)  # of a float64 norm
    found = verify(model, random_ids(60), RULE)
    assert found.right, str(found)
    assert found.double.logits < 1e-12 * found.largest_logit
    assert found.own is not None
    assert found.own.judged == (name != "mixtral")  # its routers choose experts
    assert len(found.double.layers) == model.config.num_hidden_layers


def test_calls_and_tokens_are_those_asked_for() -> None:
    """Every layer and every token of every pass is reported; a float64 model is compared in float64 only."""
    reporter = Counter()
    found = verify(tiny_model(), random_ids(60), RULE, call_length=25, progress=reporter)
    assert (found.calls, found.evictions, found.own, found.right) == ([25, 25, 10], 26, None, True)
    assert (reporter.labels, reporter.done) == (["reference in float64", "cache in float64"], 2 * 2 * 60)
    assert len(found.ms_per_token) == 2  # the two calls of 25


class Counter(Reporter):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.done = 0

    def begin(self, label: str, total: int) -> None:  # noqa: ARG002
        """Note the label."""
        self.labels.append(label)

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        self.done += steps


def test_the_model_is_left_as_it_was() -> None:
    """Neither its hooks, nor its dtype, nor its layers' forwards change."""
    model = tiny_model(torch.float32)
    verify(model, random_ids(60), RULE)
    assert model.dtype == torch.float32
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 0; the text has the errors with their bounds, one line per layer, and the verdict."""
    out, err = succeeded(capsys, *command(folder))
    for words in ("60 tokens in 31 calls", "tokens after each call: equal", "float64: largest", "float32: largest"):
        assert words in out
    assert [line.split()[0] for line in out.splitlines()[-4:-2]] == ["0", "1"]
    assert out.endswith("verdict: RIGHT\n")
    assert "[4/4] cache in float32" in err


def test_a_wrong_cache_ends_with_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts can rely on the exit status; the JSON can be read back."""
    off_by_one(monkeypatch)
    status, out, err = run(capsys, *command(folder, "--json", "--call-length", 20))
    assert status == 1, err
    found = json.loads(out)["result"]
    assert found.pop("right") is False
    assert Verdict.model_validate(found).calls == [20, 20, 20]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "10"), "use 11 or more"),
        (("--call-length", "0"), "--call-length 0"),
        (("--window", "0"), "window=0"),
    ],
)
def test_numbers_that_check_nothing_are_refused(
    more: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 2, with one line: a check without an eviction would pass for any cache."""
    assert message in refused(capsys, *command(folder, *more))


def test_a_text_that_ends_too_early_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is named, before anything is compared; one that ends early and suffices is a warning, also in JSON."""
    (folder / "short.txt").write_text(random_text(10), encoding="utf-8")
    line = refused(capsys, *command(folder, "--corpus", folder / "short.txt"))
    assert "corpus 'short', tokens: 10: streaming_2_6_1 evicts none that matters; use 11 or more" in line
    out, err = succeeded(capsys, *command(folder, "--tokens", 200, "--json"))
    warning = "100 tokens of corpus 'text' were read, 200 were requested"
    assert json.loads(out)["warnings"] == [warning]
    assert f"warning: {warning}\n" in err


def test_the_fewest_tokens_show_an_eviction() -> None:
    """With the fewest tokens that are accepted, one more token dropped is still found."""
    assert sum(call_lengths(RULE, 11)) == 11
    with pytest.raises(LabError, match="use 11 or more"):
        call_lengths(RULE, 10)
    assert verify(tiny_model(), random_ids(11), RULE).evictions == 1


def test_an_unsupported_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that cannot stream is a user's error, with the reason."""
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(random_text(100), encoding="utf-8")
    status, out, err = run(capsys, *command(tmp_path))
    assert (status, out, err.count("error: ")) == (2, "", 1)
    assert "gpt2" in err
