"""Time per output token and time to the first token, of a whole model."""

from __future__ import annotations

from typing import Any, ClassVar

from .common import (
    DEVICES,
    LIMITS,
    STREAMED,
    WARM_UP,
    checked_configuration,
    filled,
    lab,
    model_for,
    needs_compiler,
    per_token_clock,
    sample_tokens,
    shown_as,
    without_gpu,
)


def token_ids(model: Any, columns: int, rows: int = 1) -> Any:
    """Return random token ids `[rows, columns]` on the model's device."""
    import torch  # noqa: PLC0415 - `bench_import` and skipped combinations must not import it

    random = torch.Generator().manual_seed(columns)
    return torch.randint(0, model.config.vocab_size, (rows, columns), generator=random).to(model.device)


class Decode:
    """Base of the benchmarks of time per output token."""

    number = 1  # a call changes the cache
    repeat = (3, 10, 5.0)
    warmup_time = 0
    timeout = 300

    def open(self, configuration: str, device: str, streamed: int, batch: int = 1, dtype: str | None = None) -> None:
        """Fill the cache, in the first sample only, and feed a token that warms up model and device."""
        self.steps = filled(configuration, device, streamed, batch, dtype)
        self.steps.rewind(streamed * LIMITS[configuration])
        self.session = self.steps.session
        self.tokens = sample_tokens(configuration)
        self.timer = per_token_clock(self.tokens, device)
        self.token = token_ids(self.session.model, 1, batch)
        self.session.feed(self.token, last_only=True)

    def generate(self) -> None:
        """Generate the tokens of one sample with greedy search, as `lab.speed` does."""
        token = self.token
        for _ in range(self.tokens):
            token = self.session.feed(token, last_only=True).argmax(dim=-1)


class OutputToken(Decode):
    """Time per output token, after a number of tokens."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED, DEVICES]
    param_names: ClassVar = ["configuration", "streamed [limits]", "device"]
    skip_params: ClassVar = without_gpu(params)

    def setup(self, configuration: str, streamed: int, device: str) -> None:
        """Fill the cache."""
        self.open(configuration, device, streamed)

    @shown_as("Time per output token (TPOT)")
    def time_token(self, *_: object) -> None:
        """Time decode steps."""
        self.generate()


class BatchedOutputToken(Decode):
    """Time per output token of all rows together, by batch size and dtype."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252"], [1, 8], ["float32", "bfloat16"], DEVICES]
    param_names: ClassVar = ["configuration", "batch [rows]", "dtype", "device"]
    skip_params: ClassVar = without_gpu(params)

    def setup(self, configuration: str, batch: int, dtype: str, device: str) -> None:
        """Fill the cache to ten limits."""
        self.open(configuration, device, 10, batch, dtype)

    @shown_as("Time per output token (TPOT), by batch and dtype")
    def time_token(self, *_: object) -> None:
        """Time decode steps."""
        self.generate()


class CompiledOutputToken(Decode):
    """Time per output token of all rows together at fixed shapes: one compiled graph runs every step."""

    params: ClassVar[list[list[Any]]] = [["static_4_252"], [1, 8], DEVICES]
    param_names: ClassVar = ["configuration", "batch [rows]", "device"]
    skip_params: ClassVar = without_gpu(params)
    timeout = 600  # includes the minutes that compiling takes, which are part of no sample

    def setup(self, configuration: str, batch: int, device: str) -> None:
        """Fill the cache to ten limits; the first tokens compile the step and, on a GPU, record the graph."""
        needs_compiler()
        self.open(configuration, device, 10, batch)
        for _ in range(WARM_UP):
            self.session.feed(self.token, last_only=True)

    @shown_as("Time per output token (TPOT), compiled")
    def time_token(self, *_: object) -> None:
        """Time decode steps."""
        self.generate()


class FirstToken:
    """Time to the first token: a prompt in one call, during which a streaming cache evicts."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], [64, 1536], DEVICES]
    param_names: ClassVar = ["configuration", "prompt [tokens]", "device"]
    skip_params: ClassVar = without_gpu(params)
    number = 1  # a session has one first token
    repeat = (3, 10, 5.0)
    warmup_time = 0
    timeout = 300

    def setup(self, configuration: str, prompt: int, device: str) -> None:
        """Open a fresh session for every sample, after one that warms up model and device."""
        model = model_for(device)
        checked = checked_configuration(configuration)
        self.ids = token_ids(model, prompt)
        self.timer = per_token_clock(1, device)
        warm_up = lab("ways.sessions").open_session(checked, model)
        warm_up.feed(self.ids, last_only=True)
        warm_up.close()
        self.session = lab("ways.sessions").open_session(checked, model)

    def teardown(self, *_: object) -> None:
        """Detach the cache from the model."""
        if hasattr(self, "session"):
            self.session.close()

    @shown_as("Time to the first token (TTFT)")
    def time_first_token(self, *_: object) -> None:
        """Time the prefill and one argmax."""
        self.session.feed(self.ids, last_only=True).argmax(dim=-1)
