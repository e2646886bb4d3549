"""The server in examples/ speaks the protocol of `transformers serve`, and each answer is that of the request alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lab_tiny import random_text, save_chatty, tiny_model
from releases import needs
from sinkwindow import StreamingCache
from sinkwindow.model.versions import CACHE_ARGUMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs("5.24", "before, continuous batching has other parts")
PROGRAM: Final = Path(__file__).resolve().parent.parent / "examples" / "serve_streams.py"
RULE: Final[dict[str, Any]] = {"num_sinks": 2, "window": 9, "buffer": 3}
STREAMS: Final = 3  # fewer than there are requests: some wait
TOKENS: Final = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model that chats without an end, in float64: no rounding decides about a token."""
    folder = save_chatty(tmp_path_factory.mktemp("chatty"))
    tiny_model().save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start the program; warnings are errors, and there is no hub."""
    rule = [word for name, value in RULE.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-W", "error", PROGRAM, "--model", folder, *rule, "--streams", STREAMS, *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, env=os.environ | quiet | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Yield the running program and a client of it."""
    with start(folder, "--port", 0) as process:
        try:
            assert process.stderr is not None
            shown = iter(process.stderr.readline, "")
            found = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in shown)), None)
            assert found is not None, "the server did not start"
            with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="-", max_retries=0) as client:
                yield process, client
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Return the exit status, and what the server has logged since it ran that is more than information."""
    assert process.stderr is not None
    return process.wait(), [line for line in process.stderr if not line.startswith("INFO:")]


def alone(folder: Path, prompt: str, *, chat: bool, dense: bool = False) -> str:
    """Return what follows a prompt with a `StreamingCache` of its own, or with the stock cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(_messages(prompt), add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text if chat else prompt, return_tensors="pt")
    cache = {} if dense else {CACHE_ARGUMENT: StreamingCache(model, **RULE)}
    output = model.generate(**inputs, **cache, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": prompt}]


def _chat(client: Any, folder: Path, prompt: str) -> str:
    answer = client.chat.completions.create(model=str(folder), messages=_messages(prompt), max_tokens=TOKENS)
    return str(answer.choices[0].message.content)


def _chat_stream(client: Any, folder: Path, prompt: str) -> str:
    chunks = client.chat.completions.create(
        model=str(folder), messages=_messages(prompt), max_tokens=TOKENS, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def _completion(client: Any, folder: Path, prompt: str) -> str:
    return str(client.completions.create(model=str(folder), prompt=prompt, max_tokens=TOKENS).choices[0].text)


def _completion_stream(client: Any, folder: Path, prompt: str) -> str:
    chunks = client.completions.create(model=str(folder), prompt=prompt, max_tokens=TOKENS, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def _response(client: Any, folder: Path, prompt: str) -> str:
    asked: dict[str, Any] = {"instructions": "w1 w2", "input": prompt, "max_output_tokens": TOKENS}
    answer = client.responses.create(model=str(folder), stream=False, **asked)
    return str(answer.output_text)


WAYS: Final[tuple[Callable[[Any, Path, str], str], ...]] = (
    _chat,
    _chat_stream,
    _completion,
    _completion_stream,
    _response,
)


def test_each_request_is_answered_as_if_alone(server: tuple[subprocess.Popen[str], Any], folder: Path) -> None:
    """Of requests at the same time, in all five ways, none changes another; and the sinks and the window matter."""
    process, client = server
    asked = [(WAYS[seed % 5], random_text(3 + 5 * seed, seed)) for seed in range(10)]
    with ThreadPoolExecutor(len(asked)) as pool:
        running = [pool.submit(way, client, folder, prompt) for way, prompt in asked]
        answers = [one.result() for one in running]
    is_chat = [way not in {_completion, _completion_stream} for way, _ in asked]
    expected = [alone(folder, prompt, chat=chat) for (_, prompt), chat in zip(asked, is_chat, strict=True)]
    assert answers == expected
    assert min(len(answer.split()) for answer in answers) > 4 * sum(RULE.values())
    dense = [alone(folder, prompt, chat=chat, dense=True) for (_, prompt), chat in zip(asked, is_chat, strict=True)]
    assert all(one != other for one, other in zip(answers, dense, strict=True))
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, [])


def test_the_server_ends_while_a_request_runs(server: tuple[subprocess.Popen[str], Any], folder: Path) -> None:
    """A request without an end is told so, and does not keep the server from leaving."""
    process, client = server
    chunks = iter(client.completions.create(model=str(folder), prompt="w3", max_tokens=10**9, stream=True))
    for _ in range(100):
        next(chunks)
    process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError) as told:
        for _ in chunks:
            pass
    assert "finished before this request completed" in str(told.value.body)
    assert ended(process) == (0, [])


def test_a_program_that_cannot_serve_ends(folder: Path) -> None:
    """Where the port is taken, it says so and leaves; nothing goes on in the background."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(folder, "--port", taken.getsockname()[1])
        _, shown = process.communicate()
    assert process.returncode not in {0, None}
    assert "address already in use" in shown
