"""Check that the cache is right on a model: the streaming cache against the slow reference, in two dtypes.

In float64 both must agree: a key that is one position off changes logits by far more than the bound. In the model's own
dtype nothing agrees to the last bit, so the error of the cache is compared with that of the reference computed in the
same dtype: both against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from statistics import mode

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.wide import decoder_layers, wide_copy
from sinkwindow_lab.measure.clock import clock_for, spread
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import Record
from sinkwindow_lab.ways.configurations import Configuration
from sinkwindow_lab.ways.sessions import StreamingSession

PASSES = 4  # runs of the model: reference and cache, in float64 and in its own dtype
DOUBLE = 1e-9  # largest error of a float64 logit, as a share of the largest logit
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in the configuration of a model with routers
ROWS = 64  # logits that are compared at once, so that no further copy of all is made [tokens]


class Comparison(Record):
    """The cache against the reference in one dtype: largest errors."""

    dtype: str
    logits: float  # of a logit of the cache
    plain: float | None  # of the reference, computed in this dtype; None in float64, where it defines what is right
    allowed: float
    judged: bool = True  # False where one rounding may change everything after it: a router's choice of experts
    layers: list[float]  # of the cache's hidden states after each layer, as shares of the layer's largest value
    plain_layers: list[float]

    @property
    def right(self) -> bool:
        """Whether the error is within the bound, if it is judged; a NaN is not."""
        return self.logits <= self.allowed or not self.judged

    def __str__(self) -> str:
        """Return errors and bound in one line."""
        origin = (
            f"{DOUBLE:.0e} of the largest logit"
            if self.plain is None
            else f"twice the {self.plain:.2e} of the reference computed in {self.dtype}, and one rounding step"
        )
        note = "" if self.judged else "; not judged, since a rounding can choose other experts"
        return f"{self.dtype}: largest logit error {self.logits:.2e}, allowed {self.allowed:.2e}, {origin}{note}"


class Verdict(Record):
    """What was compared, and whether the cache is right."""

    configuration: str
    calls: list[int]  # their lengths [tokens]
    evictions: int
    lists_differ_after: int | None  # tokens; None if the cache never kept others than the reference
    largest_logit: float
    double: Comparison
    own: Comparison | None  # in the model's dtype; None if that is float64
    ms_per_token: list[float]  # of the cache in the model's dtype: of its calls of the most frequent length

    @property
    def right(self) -> bool:
        """Whether everything compared is as it should be."""
        errors = self.double.right and (self.own is None or self.own.right)
        return errors and self.lists_differ_after is None and self.evictions > 0

    def __str__(self) -> str:
        """Return all of it as lines of text, the verdict last."""
        found = spread(self.ms_per_token)
        after = self.lists_differ_after
        lists = "equal" if after is None else f"NOT EQUAL after {after} tokens"
        comparisons = [self.double, *([self.own] if self.own else [])]
        lines = [
            f"compared: {self.configuration} with the reference, which gathers every query's tokens and has no cache",
            f"fed: {sum(self.calls)} tokens in {len(self.calls)} calls of {min(self.calls)} to {max(self.calls)}",
            f"evictions: {self.evictions}; retained tokens after each call: {lists}",
            f"largest logit: {self.largest_logit:.4g}",
            *map(str, comparisons),
            *self._layers(comparisons),
            f"time per token of the cache: {found.median:.2f} ms [{found.lower:.2f}, {found.upper:.2f}]",
            "verdict: RIGHT" if self.right else "verdict: WRONG",
        ]
        return "\n".join(lines)

    @staticmethod
    def _layers(comparisons: list[Comparison]) -> Iterator[str]:
        columns = [(one.dtype, one.layers) for one in comparisons]
        columns += [(f"reference, {one.dtype}", one.plain_layers) for one in comparisons if one.plain_layers]
        if columns[0][1]:
            yield "largest error after each layer, as a share of the layer's largest value:"
            yield "  layer  " + "  ".join(f"{title:>18}" for title, _ in columns)
        for number, errors in enumerate(zip(*(values for _, values in columns), strict=True)):
            yield f"  {number:>5}  " + "  ".join(f"{error:>18.2e}" for error in errors)


def call_lengths(rule: Configuration, tokens: int, length: int | None = None) -> list[int]:
    """Return the lengths of the calls that feed `tokens`: all `length`; by default a long one, then single tokens."""
    sinks, window, buffer = rule.limits
    if tokens <= sinks + window + buffer + 1:  # the eviction must come before the last token, to have an effect
        raise LabError(
            f"{tokens} tokens: {rule.name} evicts none that matters; use {sinks + window + buffer + 2} or more"
        )
    if length is None:
        return [tokens // 2, *[1] * (tokens - tokens // 2)]
    if not 1 <= length <= tokens:
        raise LabError(f"--call-length {length} must be between 1 and the {tokens} tokens")
    return [min(length, tokens - start) for start in range(0, tokens, length)]


def verify(
    model: PreTrainedModel,
    ids: torch.Tensor,
    rule: Configuration,
    *,
    call_length: int | None = None,
    progress: Reporter | None = None,
) -> Verdict:
    """Compare the cache with the reference on a model, which is not changed.

    `ids` are [1, tokens], `rule` is a streaming configuration. A model that cannot stream is a `LabError`.
    """
    calls, progress, ids = call_lengths(rule, ids.shape[1], call_length), progress or Reporter(), ids.to(model.device)
    StreamingSession(model, *rule.limits).close()  # refuse a model before anything slow
    twin = wide_copy(model)
    exact = _Exact(*_reference(twin, ids, rule, progress))
    double = run = _stream(twin, ids, rule, calls, exact, progress)
    del twin  # the larger of the two models
    own = None
    if model.dtype != torch.float64:
        logits, layers = _reference(model, ids, rule, progress)
        plain = exact.error(logits, 0)
        del logits
        run = _stream(model, ids, rule, calls, exact, progress)
        own = Comparison(
            dtype=_name(model.dtype),
            logits=run.error,
            plain=plain,
            allowed=2 * plain + torch.finfo(model.dtype).eps * exact.largest,
            judged=not any(getattr(model.config.get_text_config(), name, None) for name in EXPERTS),
            layers=run.layers,
            plain_layers=exact.layer_errors(layers),
        )
    wrong = [one.differs_after for one in (double, run) if one.differs_after is not None]
    return Verdict(
        configuration=rule.name,
        calls=calls,
        evictions=run.evictions,
        lists_differ_after=min(wrong, default=None),
        largest_logit=exact.largest,
        double=Comparison(
            dtype="float64",
            logits=double.error,
            plain=None,
            allowed=DOUBLE * exact.largest,
            layers=double.layers,
            plain_layers=[],
        ),
        own=own,
        ms_per_token=run.ms_per_token,
    )


@dataclass(frozen=True)
class _Exact:
    """What the reference finds in float64: logits [1, tokens, vocab], and each layer's [1, tokens, width]."""

    logits: torch.Tensor
    layers: list[torch.Tensor]

    @property
    def largest(self) -> float:
        """The largest logit."""
        return float(self.logits.abs().max())

    def error(self, logits: torch.Tensor, start: int) -> float:
        """Return the largest error of the logits [1, tokens, vocab] of tokens from `start` on; NaN if there is one."""
        right = self.logits[:, start : start + logits.shape[1]]
        pairs = zip(torch.split(logits, ROWS, dim=1), torch.split(right, ROWS, dim=1), strict=True)
        return float(torch.stack([(ours.double() - exact).abs().max() for ours, exact in pairs]).max())

    def layer_errors(self, layers: list[torch.Tensor]) -> list[float]:
        """Return the largest error after each layer, as a share of its largest value."""
        pairs = zip(layers, self.layers, strict=True)
        return [float((ours.double() - exact).abs().max() / exact.abs().max()) for ours, exact in pairs]


@dataclass(frozen=True)
class _Run:
    """What the cache found; the fields are those of `Comparison` and `Verdict`."""

    error: float
    layers: list[float]
    differs_after: int | None
    evictions: int
    ms_per_token: list[float]


def _stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    rule: Configuration,
    calls: list[int],
    exact: _Exact,
    progress: Reporter,
) -> _Run:
    """Feed the cache call by call, and compare it after each."""
    from sinkwindow_reference import RetainedList

    kept, clock, session = RetainedList(*rule.limits), clock_for(model.device), StreamingSession(model, *rule.limits)
    errors, times, seen = [], [], 0
    differs_after: int | None = None
    with closing(session), _watch(model, f"cache in {_name(model.dtype)}", ids.shape[1], progress) as layers:
        for call in torch.split(ids, calls, dim=1):
            begin = clock.mark()
            logits = session.feed(call)
            times.append((call.shape[1], begin, clock.mark()))
            errors.append(exact.error(logits, seen))
            for token in range(seen, seen + call.shape[1]):
                kept.append(token)
                kept.evict_if_full()
            seen += call.shape[1]
            if differs_after is None and session.cache.retained_tokens != [kept.tokens]:
                differs_after = seen
    usual = mode(calls)
    return _Run(
        error=float(torch.tensor(errors, dtype=torch.float64).max()),  # a NaN stays one, unlike in Python's max
        layers=exact.layer_errors([torch.cat(parts, dim=1) for parts in layers]),
        differs_after=differs_after,
        evictions=session.evictions,
        ms_per_token=[1e3 * clock.seconds(begin, end) / usual for length, begin, end in times if length == usual],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reference(
    model: PreTrainedModel, ids: torch.Tensor, rule: Configuration, progress: Reporter
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the reference's logits [1, tokens, vocab] and each layer's hidden states, in the model's dtype."""
    from sinkwindow_reference import reference_logits

    sinks, window, buffer = rule.limits
    with _watch(model, f"reference in {_name(model.dtype)}", ids.shape[1], progress) as layers:
        try:
            logits = reference_logits(model, ids, num_sinks=sinks, window=window, buffer=buffer, upcast=False)
        except (ValueError, RuntimeError) as error:
            raise LabError(f"the reference cannot run this model in {_name(model.dtype)}: {error}") from error
    return logits, [torch.cat(parts, dim=1) for parts in layers]


@contextmanager
def _watch(model: PreTrainedModel, label: str, tokens: int, progress: Reporter) -> Iterator[list[list[torch.Tensor]]]:
    """Collect the hidden states that each layer returns within the block, call by call, and report progress."""
    layers = decoder_layers(model)
    found: list[list[torch.Tensor]] = [[] for _ in layers]

    def hook(number: int) -> Callable[..., None]:
        def collect(_module: object, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            found[number].append(states.detach())
            progress.advance(states.shape[1])

        return collect

    progress.begin(label, tokens * len(layers))
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook(number)).remove)
        yield found
