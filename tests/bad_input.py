"""Bad, odd and contradictory input to everything public, and what comes of it.

Run as a script, this file prints docs/bad-input.md (`python tests/bad_input.py > docs/bad-input.md`). Every line
is fed by `test_bad_input.py`.
"""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from sinkwindow import Retention, StreamingCache
from strategies import CACHE_NAME, ModelSpec, Rule, call, observe, tokens

RULE: Final = Rule(2, 5, 1)
WIDE: Final = Rule(2, 30, 1)  # evicts nothing here
SPEC: Final = ModelSpec(max_positions=64)
ROWS, FED, NEW = 2, 12, 4  # rows, columns in the caches, columns of a new call
LEFT: Final = 3  # columns of padding in front of row 0 of `padded`
ERRORS: Final = (
    TypeError,
    ValueError,
    RuntimeError,
    OverflowError,
    IndexError,
    OSError,
)  # UnsupportedModelError is one


@dataclass(frozen=True)
class Line:
    """One input.

    Attributes:
        call: The expression.
        like: An expression with the same effect, if it works; else it is refused.
    """

    call: str
    like: str = ""


def _refused(*calls: str) -> list[Line]:
    return [Line(call) for call in calls]


NO_SIZE: Final = ("4.0", "'4'", "None", "True", "nan", "[4]", "-1", "10**12", "np.float32(4)", "np.bool_(True)")
NO_SIZES: Final = (
    *NO_SIZE,
    "torch.tensor(4.0)",
    "torch.tensor(True)",
    "torch.tensor([4, 5])",
    "torch.ones(1, device='meta')",
)
SIZES: Final = ("np.int64(4)", "torch.tensor(4)", "np.uint8(4)")
LINES: Final[dict[str, list[Line]]] = {
    "StreamingCache(model, ...)": [
        *(Line(f"made({name}={value})") for name in ("num_sinks", "window", "buffer") for value in NO_SIZES),
        *(
            Line(f"made({name}={value})", f"made({name}=4)")
            for name in ("num_sinks", "window", "buffer")
            for value in SIZES
        ),
        *_refused("made(window=0)", "made(window=2**31)", "made(window=10, sinks=4)"),
        *_refused(
            "made(evict='calls')",
            "made(evict=None)",
            "made(evict=['token'])",
            "made(evict=np.array(['token', 'call']))",
        ),
        *_refused(
            "made(positions='ranks')",
            "made(positions=None)",
            "made(on_overflow='raise')",
            "made(on_overflow=True)",
            "made(family=3)",
        ),
        *_refused(
            "made(static='yes')", "made(static=1)", "made(static=None)", "made(on_evict=3)", "made(on_evict='print')"
        ),
        *_refused("made(static=True, evict='call')", "made(static=True, on_evict=print)"),
        *_refused("made(static=True, positions='original')", "made(static=True, on_overflow='error')"),
        *_refused(
            "StreamingCache(None)", "StreamingCache('model')", "StreamingCache(model.config)", "StreamingCache(linear)"
        ),
        *_refused("StreamingCache(type(model))"),
        *_refused("StreamingCache(encoder_decoder)", "StreamingCache(torch.compile(model))"),
        *_refused("StreamingCache(wrapper)", "Retention(4, 8, 0, 'sometimes')", "Retention(4, 8.0)"),
    ],
    "model(input_ids, ...)": [
        *_refused(
            "feed(None)", "feed(ids[:, :0])", "feed(ids[:0])", "feed(ids[0])", "feed(ids[None])", "feed(ids.double())"
        ),
        *_refused("feed(ids == 1)", "feed(ids.tolist())", "feed(ids[:1])", "feed(None, inputs_embeds=ids)"),
        *_refused("feed(None, inputs_embeds=embeds[0])", "feed(ids, inputs_embeds=embeds)"),
        Line("feed(None, inputs_embeds=embeds)", "feed(ids)"),
        Line("feed(ids.int())", "feed(ids)"),
        Line("feed(ids, use_cache=True)", "feed(ids)"),
        Line("feed(ids, both=cache)", "feed(ids)"),
        *_refused(
            "feed(ids, both=twin)",
            "feed(ids, is_causal=False)",
            "feed(ids, seq_idx=ids)",
            "feed(ids, cu_seq_lens_q=ids[0])",
        ),
    ],
    "model(..., attention_mask)": [
        Line("feed(ids, attention_mask=ones)", "feed(ids)"),
        Line("feed(ids, attention_mask=ones[:, -4:])", "feed(ids)"),
        Line("feed(ids, attention_mask=ones.double())", "feed(ids)"),
        Line("feed(ids, attention_mask=ones.bool())", "feed(ids)"),
        Line("feed(ids, padded, attention_mask=left)", "feed(ids, padded)"),
        Line(
            "feed(ids, attention_mask=hidden(0, 12, 16))", "feed(ids, attention_mask=hidden(0, 12, 16)[:, -4:].bool())"
        ),
        *_refused("feed(ids, attention_mask=ones.tolist())", "feed(ids, attention_mask=ones[0])"),
        *_refused("feed(ids, attention_mask=ones[:1])", "feed(ids, attention_mask=ones[:, 1:])"),
        *_refused("feed(ids, attention_mask=ones[:, None, None])", "feed(ids, attention_mask=ones * 2)"),
        *_refused("feed(ids, attention_mask=(ones - 1) * 1e9)", "feed(ids, attention_mask=ones * nan)"),
        *_refused("feed(ids, attention_mask=hidden(0, 0, 3))", "feed(ids, attention_mask=hidden(1, 8, 11))"),
        *_refused("feed(ids, padded, attention_mask=ones)", "feed(ids, padded, attention_mask=left.roll(1, 1))"),
        *_refused("feed(ids, attention_mask={})", "feed(ids, attention_mask={'other': ones})"),
        *_refused("feed(ids, attention_mask={'full_attention': ones[0]})"),
        *_refused("feed(ids, attention_mask={'full_attention': ones[:, None]})"),
        *_refused("feed(ids, ring, attention_mask=ones[:, None, None, :].bool())"),
        *_refused("feed(ids, attention_mask=ones.to_sparse())", "feed(ids, attention_mask=ones * 1j)"),
        *_refused("feed(ids, attention_mask=hidden(1, 15, 16))", "feed(ids, ring, attention_mask=hidden(0, 0, 3))"),
    ],
    "model(..., position_ids)": [
        Line("feed(ids, position_ids=places(12))", "feed(ids)"),
        Line("feed(ids, position_ids=places(12)[:1])", "feed(ids)"),
        Line("feed(ids, position_ids=places(8))", "feed(ids)"),
        Line("feed(ids, padded, position_ids=places(9))", "feed(ids, padded)"),
        *_refused(
            "feed(ids, position_ids=places(0))",
            "feed(ids, position_ids=places(13))",
            "feed(ids, ring, position_ids=places(0))",
        ),
        *_refused("feed(ids, position_ids=places(12) * 2)", "feed(ids, position_ids=places(12)[:, :2])"),
        *_refused("feed(ids, position_ids=places(12).tolist())", "feed(ids, position_ids=places(12).expand(3, 2, 4))"),
    ],
    "reorder_cache(beam_idx), batch_select_indices(indices), batch_repeat_interleave(repeats)": [
        *(
            line
            for name in ("reorder_cache", "batch_select_indices")
            for line in (
                Line(f"cache.{name}([1, 0])", f"cache.{name}(torch.tensor([1, 0]))"),
                Line(f"cache.{name}(np.array([1, 0]))", f"cache.{name}(torch.tensor([1, 0]))"),
                Line(f"cache.{name}(torch.tensor([1, 0]).int())", f"cache.{name}(torch.tensor([1, 0]))"),
                Line(f"cache.{name}(torch.tensor([False, True]))", f"cache.{name}(torch.tensor([1]))"),
                *(
                    Line(f"cache.{name}({value})")
                    for value in (
                        *("None", "'0'", "1", "[0.0]", "[]", "[2]", "[-1]", "[[0, 1]]", "torch.tensor([0.0, nan])"),
                        *("torch.tensor([True])", "torch.tensor([True, False, True])", "torch.tensor([False, False])"),
                        "torch.zeros(2, dtype=torch.long, device='meta')",
                    )
                ),
            )
        ),
        Line("cache.batch_repeat_interleave(np.int64(2))", "cache.batch_repeat_interleave(2)"),
        *_refused(
            *(f"cache.batch_repeat_interleave({value})" for value in ("0", "-1", "1.5", "None", "True", "10**9"))
        ),
        Line("new.reorder_cache(torch.tensor([0]))", "None"),
        Line("new.batch_repeat_interleave(2)", "None"),
    ],
    "crop(tokens_to_remove), can_crop(columns)": [
        Line("wide.crop(np.int64(-3))", "wide.crop(-3)"),
        Line("wide.crop(torch.tensor(-3))", "wide.crop(-3)"),
        Line("new.crop(0)", "None"),
        *_refused(
            *(f"wide.crop({value})" for value in ("1", "-13", "-1.0", "'-1'", "None", "True", "-(10**30)", "nan"))
        ),
        *_refused("new.crop(-1)"),
        *_refused(*(f"wide.can_crop({value})" for value in ("-1", "1.0", "'1'", "None", "True", "nan"))),
        Line("wide.can_crop(10**9)", "None"),
    ],
    "snapshot(), restore(snapshot), save(path), load(path, model), copies": [
        *_refused(
            "cache.restore(None)",
            "cache.restore(cache)",
            "cache.restore(wide.snapshot())",
            "cache.restore(ring.snapshot())",
        ),
        *_refused("cache.restore(foreign.snapshot())", "ring.restore(cache.snapshot())"),
        Line("cache.restore(cache.snapshot())", "None"),
        *_refused(
            "cache.save(None)",
            "cache.save(3)",
            "cache.save('/no/such/folder/a')",
            "cache.save(folder)",
            "cache.save('x' * 300)",
        ),
        *_refused(
            "StreamingCache.load('/no/such/file', model)",
            "StreamingCache.load(folder, model)",
            "StreamingCache.load(None, model)",
        ),
        *_refused("StreamingCache.load(saved(cache), other)", "StreamingCache.load(saved(cache), None)"),
        *_refused("StreamingCache.load(saved(cache), model, on_evict=3)"),
        *_refused("copy.copy(cache)", "pickle.dumps(cache)", "torch.save(cache, f'{folder}/a')"),
    ],
    "what transformers asks": [
        *_refused(
            "cache.get_mask_sizes(1, 2)",
            "cache.get_mask_sizes(1, None)",
            "cache.update(keys, keys, 0)",
            "cache.update(keys, keys, 9)",
        ),
        *_refused("cache.layers[0].update(keys, keys)", "cache.layers[0].get_mask_sizes(1)"),
    ],
}


class Bench:
    """Caches with content, and the names that the lines use.

    Attributes:
        names: Of everything a line may use.
        caches: Those among them whose state must not change when a line is refused.
    """

    def __init__(self, folder: Path) -> None:
        model, other, ids = SPEC.model(), SPEC.with_(head_dim=16).model(), tokens(0, ROWS, FED + NEW)
        rules = {"cache": RULE, "twin": RULE, "new": RULE, "wide": WIDE, "padded": WIDE}
        self.caches = {name: rule.cache(model) for name, rule in rules.items()}
        self.caches["ring"] = RULE.cache(model, static=True)
        self.caches["foreign"] = RULE.cache(other)
        self.model, self.ids = model, ids
        left = torch.ones(ROWS, FED, dtype=torch.long)
        left[0, :LEFT] = 0
        for name, cache in self.caches.items():
            if name != "new":
                call(other if name == "foreign" else model, cache, ids[:, :FED], left if name == "padded" else None)
        wrapper, embed = torch.nn.Module(), model.get_input_embeddings()
        wrapper.inner = model
        self.folder = folder
        ones = torch.ones(ROWS, FED + NEW, dtype=torch.long)
        classes = {"StreamingCache": StreamingCache, "Retention": Retention, "encoder_decoder": _encoder_decoder()}
        modules = {"torch": torch, "np": np, "copy": copy, "pickle": pickle, "nan": float("nan"), "folder": str(folder)}
        models = {"model": model, "other": other, "linear": torch.nn.Linear(2, 2), "wrapper": wrapper}
        new = {"ids": ids[:, FED:], "embeds": embed(ids[:, FED:]), "keys": torch.zeros(ROWS, 1, 1, 8).double()}
        masks = {"ones": ones, "left": torch.cat((left, ones[:, :NEW]), dim=1)}
        verbs = {name: getattr(self, name) for name in ("made", "feed", "hidden", "places", "saved")}
        self.names: dict[str, Any] = {**self.caches, **classes, **modules, **models, **new, **masks, **verbs}

    def made(self, **arguments: Any) -> str:
        """Make a cache; return how it describes itself."""
        return repr(StreamingCache(self.model, **({"num_sinks": 2, "window": 5, "buffer": 1} | arguments)))

    def feed(
        self, ids: Any, cache: StreamingCache | None = None, *, both: Any = None, **arguments: Any
    ) -> torch.Tensor:
        """Call the model with a cache, the one named `cache` if none is given; return the last logits."""
        cache = self.caches["cache"] if cache is None else cache
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the older of two names
            given = {"cache": cache, "past_key_values": both} if both is not None else {CACHE_NAME: cache}
            logits: torch.Tensor = self.model(input_ids=ids, **given, **arguments).logits[:, -1]
        return logits

    def hidden(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Return a mask over all columns that hides some of a row's."""
        mask = torch.ones(ROWS, FED + NEW, dtype=torch.long)
        mask[row, start:stop] = 0
        return mask

    def places(self, first: int) -> torch.Tensor:
        """Return position_ids for a new call; of row 0 and row 1 the same, but for the padded cache."""
        start = torch.tensor([[first], [first + LEFT]]) if first == FED - LEFT else torch.tensor([[first], [first]])
        return start + torch.arange(NEW)

    def saved(self, cache: StreamingCache) -> Path:
        """Save a cache; return the file."""
        path = Path(self.folder, "cache.safetensors")
        cache.save(path)
        return path

    def result(self, line: str) -> object:
        """Evaluate a line; return its value, or the error that refused it."""
        try:
            return eval(line, self.names)  # noqa: S307 - a line of this file
        except ERRORS as error:
            return error

    def observed(self) -> dict[str, Any]:
        """Return what can be observed of all caches."""
        return {name: observe(cache) for name, cache in self.caches.items()}


def _encoder_decoder() -> torch.nn.Module:
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    return T5ForConditionalGeneration(T5Config(**sizes))


def page() -> str:
    """Return docs/bad-input.md."""
    parts = [INTRODUCTION]
    for title, lines in LINES.items():
        rows = []
        for line in lines:
            with tempfile.TemporaryDirectory() as folder:
                result = Bench(Path(folder)).result(line.call)
            text = f"{type(result).__name__}: {result}" if isinstance(result, Exception) else f"works, as `{line.like}`"
            text = text.replace("as `None`", "and changes nothing").replace(folder, "folder")
            text = re.sub(r"0x[0-9a-f]+", "0x...", text).replace("\n", " ").replace("|", "\\|")
            rows.append(f"| `{line.call}` | {text} |\n")
        parts.append(f"\n## {title}\n\n| call | result |\n|---|---|\n{''.join(rows)}")
    return "".join(parts)


INTRODUCTION: Final = f"""# Bad input

Every line is fed by `tests/test_bad_input.py`, which checks that a refusal changes nothing and that what works has the
effect named. This page is written by `python tests/bad_input.py`.

`feed(ids, cache, ...)` is `model(ids, cache=cache, ...)`, and `made(...)` is `StreamingCache(model, ...)`. The caches hold
{ROWS} rows of {FED} tokens, with S={RULE.num_sinks}, W={RULE.window}, B={RULE.buffer}. Of them `wide` has W={WIDE.window}, `padded` too, and {LEFT} columns
of padding in front of row 0; `ring` is static, `new` was never fed, `foreign` is another model's.

Token ids beyond the vocabulary are the model's to refuse, as with any cache: torch raises an `IndexError`, and the
call does not count.
"""  # noqa: E501 - lines are shorter when the numbers are in


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(page(), end="")  # noqa: T201 - this is what the script is for
