"""Check that the cache is right on a model: the streaming cache against the slow reference, in two dtypes.

In float64 both must agree: a key that is one position off changes logits by far more than the bound. In the model's own
dtype nothing agrees to the last bit, so the error of the cache is compared with that of the reference computed in the
same dtype: both against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.wide import decoder_layers, wide_copy
from sinkwindow_lab.measure.clock import clock_for, quartiles
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import Configuration, Record
from sinkwindow_lab.ways.sessions import StreamingSession

if TYPE_CHECKING:
    from sinkwindow import Family

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
        lower, median, upper = quartiles(self.ms_per_token)
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
            f"time per token of the cache: {median:.2f} ms [{lower:.2f}, {upper:.2f}]",
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


def call_lengths(rule: Configuration, tokens: int, length: int | None = None, of: str = "--tokens") -> list[int]:
    """Return the lengths of calls that feed `tokens` (named `of` what): all `length`, or a long one, then 1."""
    least = sum(rule.limits) + 2  # the eviction must come before the last token, to have an effect
    if tokens < least:
        raise LabError(f"{of} {tokens}: {rule.name} evicts none that matters; use {least} or more")
    if length is None:
        return [tokens // 2, *[1] * (tokens - tokens // 2)]
    if not 1 <= length <= tokens:
        raise LabError(f"--call-length {length} must be between 1 and the {tokens} tokens")
    return [min(length, tokens - start) for start in range(0, tokens, length)]


def largest_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error of logits or hidden states [batch, tokens, size]; NaN if there is one."""
    pairs = zip(torch.split(ours, ROWS, dim=1), torch.split(exact, ROWS, dim=1), strict=True)
    return float(torch.stack([(one.double() - right).abs().max() for one, right in pairs]).max())


def rounding_step(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Return what one rounding changes at most: errors may be twice those of the reference in `dtype`, plus this."""
    return float(torch.finfo(dtype).eps * exact.abs().max())


def verify(
    model: PreTrainedModel,
    ids: torch.Tensor,
    rule: Configuration,
    *,
    call_length: int | None = None,
    family: Family | None = None,
    progress: Reporter | None = None,
) -> Verdict:
    """Compare the cache with the reference on a model, which is not changed, and on `ids` [1, tokens].

    `family` is what `check_untested` has found, for a model that is not in the table.
    """
    calls, ids = call_lengths(rule, ids.shape[1], call_length), ids.to(model.device)
    check = _Check(ids, rule, calls, progress or Reporter(), family)
    check.session(model).close()  # refuse a model before anything slow
    twin = wide_copy(model)
    exact = check.reference(twin)
    double, found = check.stream(twin, exact, None)
    del twin  # the larger of the two models
    own: Comparison | None = None
    differ = [found["lists_differ_after"]]
    if model.dtype != torch.float64:
        own, found = check.stream(model, exact, exact.errors(check.reference(model)))
        differ.append(found["lists_differ_after"])
    found["lists_differ_after"] = min(filter(None, differ), default=None)
    largest = float(exact.logits.abs().max())
    return Verdict(configuration=rule.name, calls=calls, largest_logit=largest, double=double, own=own, **found)


@dataclass(frozen=True)
class _States:
    """What a run finds: logits [1, tokens, vocab], and each layer's hidden states [1, tokens, width]."""

    logits: torch.Tensor
    layers: list[torch.Tensor]

    def layer_errors(self, layers: list[torch.Tensor]) -> list[float]:
        """Return the largest error after each layer, as a share of its largest value, if these are exact."""
        return [
            largest_error(ours, exact) / float(exact.abs().max())
            for ours, exact in zip(layers, self.layers, strict=True)
        ]

    def errors(self, found: _States) -> tuple[float, list[float]]:
        """Return the largest error of a logit, and those after each layer, if these are exact."""
        return largest_error(found.logits, self.logits), self.layer_errors(found.layers)


@dataclass(frozen=True)
class _Check:
    """What all runs of a check have in common."""

    ids: torch.Tensor
    rule: Configuration
    calls: list[int]
    progress: Reporter
    family: Family | None

    def session(self, model: PreTrainedModel) -> StreamingSession:
        """Open a cache."""
        options: dict[str, Any] = {} if self.family is None else {"family": self.family}
        return StreamingSession(model, *self.rule.limits, **options)

    def reference(self, model: PreTrainedModel) -> _States:
        """Return what the reference computes in the model's dtype."""
        from sinkwindow_reference import reference_logits

        sizes: dict[str, Any] = dict(zip(("num_sinks", "window", "buffer"), self.rule.limits, strict=True))
        ropes = None if self.family is None else ropes_of(model, self.family)
        with self._watch(model, "reference") as layers:
            try:
                logits = reference_logits(model, self.ids, **sizes, ropes=ropes, upcast=False)
            except (ValueError, RuntimeError) as error:
                raise LabError(f"the reference cannot run this model in {_name(model.dtype)}: {error}") from error
        return _States(logits, [torch.cat(parts, dim=1) for parts in layers])

    def stream(
        self, model: PreTrainedModel, exact: _States, plain: tuple[float, list[float]] | None
    ) -> tuple[Comparison, dict[str, Any]]:
        """Compare the cache with the reference, whose own errors are `plain`; return fields of a `Verdict`."""
        from sinkwindow_reference import RetainedList

        session, clock = self.session(model), clock_for(model.device)
        errors, times, kept, seen = [], [], RetainedList(*self.rule.limits), 0
        differs_after: int | None = None
        with session, self._watch(model, "cache") as layers:
            for call in torch.split(self.ids, self.calls, dim=1):
                begin = clock.mark()
                logits = session.feed(call)
                times.append((call.shape[1], begin, clock.mark()))
                errors.append(largest_error(logits, exact.logits[:, seen : seen + call.shape[1]]))
                for token in range(seen, seen + call.shape[1]):
                    kept.append(token)
                    kept.evict_if_full()
                seen += call.shape[1]
                if differs_after is None and session.cache.retained_tokens != [kept.tokens]:
                    differs_after = seen
        usual = mode(self.calls)
        own = None if plain is None else 2 * plain[0] + rounding_step(exact.logits, model.dtype)
        comparison = Comparison(
            dtype=_name(model.dtype),
            logits=float(torch.tensor(errors, dtype=torch.float64).max()),  # a NaN stays one, unlike in Python's max
            plain=None if plain is None else plain[0],
            allowed=DOUBLE * float(exact.logits.abs().max()) if own is None else own,
            judged=own is None or not any(getattr(model.config.get_text_config(), name, None) for name in EXPERTS),
            layers=exact.layer_errors([torch.cat(parts, dim=1) for parts in layers]),
            plain_layers=[] if plain is None else plain[1],
        )
        spent = [1e3 * clock.seconds(begin, end) / usual for length, begin, end in times if length == usual]
        found = {"evictions": session.evictions, "lists_differ_after": differs_after, "ms_per_token": spent}
        return comparison, found

    @contextmanager
    def _watch(self, model: PreTrainedModel, what: str) -> Iterator[list[list[torch.Tensor]]]:
        """Collect the hidden states that each layer returns within the block, call by call, and report progress."""
        layers = decoder_layers(model)
        found: list[list[torch.Tensor]] = [[] for _ in layers]

        def hook(number: int) -> Callable[..., None]:
            def collect(_module: object, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                states = output if isinstance(output, torch.Tensor) else output[0]
                found[number].append(states.detach())
                self.progress.advance(states.shape[1])

            return collect

        self.progress.begin(f"{what} in {_name(model.dtype)}", self.ids.shape[1] * len(layers))
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.callback(layer.register_forward_hook(hook(number)).remove)
            yield found


def ropes_of(model: PreTrainedModel, family: Family) -> list[Any]:
    """Return how each layer rotates, for the reference, which knows no model that nobody has tried."""
    from sinkwindow.model.families import inspect_model
    from sinkwindow_reference.models.rope import Rope

    facts = inspect_model(model, family)
    by_layer = {layer: kind for kind in facts.kinds for layer in kind.layers}
    by_type = {kind.layer_type: kind for kind in facts.kinds}
    kinds = [*(by_layer[layer] for layer in sorted(by_layer)), *(by_type[name] for name in facts.borrowers)]
    return [Rope(kind.rotary.inv_freq, kind.rotary.interleaved) for kind in kinds]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
