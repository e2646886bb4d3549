"""The programs in examples/ run as they stand, on a folder with a tiny model, and do what they say."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab_tiny import WORDS, save_chatty, text_of_lines
from releases import NEW_ALONE
from sinkwindow import Chat
from sinkwindow.model.versions import CACHE_ARGUMENT
from sinkwindow_reference import reference_logits

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES: Final = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model that can chat."""
    return save_chatty(tmp_path_factory.mktemp("chatty"))


def start(name: str, folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a program, as this release of transformers names a cache; warnings are errors, and there is no hub."""
    program = (EXAMPLES / name).read_text(encoding="utf-8").replace("cache=cache", f"{CACHE_ARGUMENT}=cache")
    command = [sys.executable, "-W", "error", "-c", program, "--model", folder, "--window", 20, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def finish(process: subprocess.Popen[bytes], text: str = "") -> str:
    """Give a program the rest of its input; return what it has shown."""
    out, err = process.communicate(text.encode())
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


def _ids(folder: Path, text: str) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


def test_there_is_no_other_example() -> None:
    """Each has a test here, or in test_serving.py."""
    names = {"chat.py", "log_reader.py", "serve_streams.py", "transcript.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == names


@NEW_ALONE
def test_chat(folder: Path) -> None:
    """Its answers are those of `Chat`, and it says at the end what it has cost."""
    out = finish(start("chat.py", folder, "--system", "w1 w2"), "w3 w4\nw5\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = Chat(model, tokenizer, "w1 w2", window=20, buffer=64)
    answers = [chat.ask(message, max_new_tokens=200) for message in ("w3 w4", "w5")]
    shown = [line.removeprefix("> ") for line in out.splitlines()]
    assert shown[:2] == answers
    assert re.fullmatch(rf"{chat.cache.seen_tokens[0]} tokens, \d+ evictions, 0.\d\d MB of cache", shown[-1])


def test_log_reader(folder: Path) -> None:
    """PPL is the reference's, line by line; only the line of the least likely words is marked."""
    model, usual = AutoModelForCausalLM.from_pretrained(folder), "w3 w9 w4 w11 w5\n"
    ids = torch.cat([torch.tensor([[0]]), _ids(folder, usual * 40)], dim=1)  # BOS first
    for _ in range(5):
        logits = reference_logits(model, ids, num_sinks=4, window=20, buffer=64)
        ids = torch.cat([ids, 2 + logits[:, -1:, 2:].argmin(-1)], dim=1)
    ids = torch.cat([ids, _ids(folder, usual * 3)], dim=1)
    logits = reference_logits(model, ids, num_sinks=4, window=20, buffer=64)[0, :-1].log_softmax(-1)
    losses, end = -logits.gather(1, ids[0, 1:, None])[:, 0], 0
    odd = " ".join(WORDS[index] for index in ids[0, 201:206])
    text = f"{usual * 40}{odd}\n{usual * 3}"
    shown = finish(start("log_reader.py", folder), text).splitlines()
    for line, row in zip(text.splitlines(), shown, strict=True):
        found = re.fullmatch(r"([ !]) +([\d.]+)  (.*)", row)
        assert found is not None
        tokens = len(line.split())
        assert found[3] == line
        assert float(found[2]) == pytest.approx(math.exp(losses[end : end + tokens].mean()), rel=1e-3, abs=0.06)
        end += tokens
    assert [index for index, row in enumerate(shown) if row.startswith("!")] == [40]


def test_log_reader_follows(folder: Path) -> None:
    """A line is shown as soon as it has come, not at the end."""
    process = start("log_reader.py", folder)
    assert process.stdin is not None
    assert process.stdout is not None
    for line in ("w3 w4\n", "w5\n"):
        process.stdin.write(line.encode())
        process.stdin.flush()
        assert process.stdout.readline().decode().endswith(f"  {line}")
    assert finish(process) == ""


def test_log_reader_reads_any_bytes(folder: Path) -> None:
    """A line without tokens is shown, and bytes that are no UTF-8 are replaced: a log may hold both."""
    process = start("log_reader.py", folder)
    out, err = process.communicate(b"w3 w4\n\n\xff\xfe\nw5\n")
    assert (process.returncode, err) == (0, b"")
    assert [line.split("  ")[-1] for line in out.decode().splitlines()] == ["w3 w4", "", "\ufffd\ufffd", "w5"]


@NEW_ALONE
def test_transcript_does_not_wait_for_a_space(folder: Path) -> None:
    """Text without spaces is heard as it comes: what waits stays short."""
    process = start("transcript.py", folder, "--every", 1)
    assert process.stdin is not None
    assert process.stdout is not None
    with ThreadPoolExecutor() as reader:
        for heard in (1, 2):
            process.stdin.write("\u8bed".encode() * 300)
            process.stdin.flush()
            note = reader.submit(process.stdout.readline)
            try:
                assert note.result(timeout=120).decode().startswith(f"[{heard} tokens] ")
            except TimeoutError:  # the program waits, and so would the end of the block
                process.kill()
                raise
    assert finish(process) == ""


@NEW_ALONE
def test_transcript(folder: Path) -> None:
    """However the text comes in pieces, each note is what the model says after that much of it; no note is heard."""
    text = text_of_lines(30)
    process = start("transcript.py", folder, "--every", 40, "--note", " w7 w8")
    assert process.stdin is not None
    for begin in range(0, len(text), 17):
        process.stdin.write(text[begin : begin + 17].encode())
        process.stdin.flush()
        time.sleep(0.01)
    shown = finish(process).splitlines()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for heard in (40, 80, 120):
        ids = torch.cat([_ids(folder, text)[:, :heard], _ids(folder, " w7 w8")], dim=1)
        for _ in range(40):
            logits = reference_logits(model, ids, num_sinks=4, window=20, buffer=64)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        expected.append(f"[{heard} tokens] {tokenizer.decode(ids[0, heard:], skip_special_tokens=True)}")
    assert shown == expected
