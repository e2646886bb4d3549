"""The argument names of transformers' former `SinkCache`, on a `StreamingCache`.

`model.generate(..., custom_generate=<this repository>, trust_remote_code=True, window_length=256, num_sink_tokens=4)`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkwindow import StreamingCache
from sinkwindow.model.versions import CACHE_ARGUMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel, *, window_length: int = 256, num_sink_tokens: int = 4, buffer: int = 0, **kwargs: Any
) -> Any:
    """Generates with attention sinks and a sliding window.

    Args:
        model: The model that `generate` was called on.
        window_length: Retained tokens, sinks included, as `SinkCache` counted them [tokens].
        num_sink_tokens: Of these, the first tokens that are never evicted [tokens].
        buffer: How far the cache may overgrow before one batched eviction [tokens].
        **kwargs: All other arguments of `generate`.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: `window_length` leaves no room beside the sinks, or a cache is passed as well.
    """
    if window_length <= num_sink_tokens:
        raise ValueError(
            "window_length must exceed num_sink_tokens, since it counts the sinks too, "
            f"got {window_length} and {num_sink_tokens}"
        )
    given = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{given[0]} must not be passed together with custom_generate, which makes a StreamingCache of its own; "
            "to keep a cache across calls pass a StreamingCache to the ordinary generate"
        )
    cache = StreamingCache(model, num_sink_tokens, window_length - num_sink_tokens, buffer)
    return model.generate(**{CACHE_ARGUMENT: cache}, **kwargs)
