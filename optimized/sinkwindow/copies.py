"""Copies of a cache: in memory, as files, and what cannot be copied."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from torch import nn

from sinkwindow.model.calls import Calls, News
from sinkwindow.model.families import layer_devices
from sinkwindow.model.fingerprint import check_agreement, check_rank, fingerprint, ranks
from sinkwindow.saving import check, encoded, placed, position, rank_file, read, write
from sinkwindow.stream.state import Snapshot

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from transformers import PreTrainedModel
    from typing_extensions import Self

    from sinkwindow.stream.events import Eviction
    from sinkwindow.stream.state import State

    OnEvict = Callable[[Eviction], object] | None


class Copies(Calls):
    """Copy and save a cache; the base of ``StreamingCache``.

    Attributes:
        _settings: Arguments of the constructor, but for ``model`` and ``on_evict``.
    """

    _settings: dict[str, Any]

    if TYPE_CHECKING:

        def __init__(self, model: nn.Module, *, on_evict: OnEvict = None, **settings: Any) -> None: ...

    def snapshot(self) -> Snapshot:
        """Copy the cache's content, to come back to it with ``restore`` any number of times.

        Examples:
            >>> snapshot = cache.snapshot()
            >>> cache.reset()
            >>> cache.restore(snapshot)
            >>> cache.seen_tokens
            [9]
        """
        with self._idle("be copied") as stream:
            return Snapshot(self._settings, self._fingerprint(), stream.state.cloned())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, or of one with the same sizes on a model with the same weights.

        Raises:
            TypeError: ``snapshot`` is no snapshot.
            ValueError: It is of a cache with other sizes or positions, of another model, or of another rank of one that
                is split; nothing has changed then.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot must be what snapshot() returned, got {type(snapshot).__name__}.")
        self._check(snapshot)
        self._go_on_from(snapshot.state.cloned())

    def _check(self, snapshot: Snapshot) -> None:
        own = self._fingerprint()
        check_rank(snapshot.model, own)
        snapshot.check(self._settings, own)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the cache to a safetensors file; another process goes on from there, bit for bit, with ``load``.

        At any moment there is the old file at ``path`` or the whole new one, even if the process is killed (then a file
        named ``.*.part`` may be left beside it).

        Args:
            path: The file. Where the model is split over ranks, each has a file of its own: for ``chat.safetensors``
                rank 0 of 2 writes ``chat.rank0of2.safetensors``. All save, and all load.

        Raises:
            OSError: It cannot be written; what was there is unchanged.
        """
        with self._idle("be saved") as stream:
            content = encoded(Snapshot(self._settings, self._fingerprint(), stream.state))
        own = ranks(self._decoder())
        write(path if own is None else rank_file(path, *own), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, *, on_evict: OnEvict = None) -> Self:
        """Return a cache with the content, the sizes and the options of one that was saved.

        Args:
            path: What ``save`` was given.
            model: A model with the same weights, in the same dtype, on any device, split over as many ranks.
            on_evict: As of the constructor: a file holds no function.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no file of a cache, is damaged, is of another format, of another model, of another rank,
                or of another moment than the files of the other ranks.

        Examples:
            >>> import tempfile, pathlib
            >>> path = pathlib.Path(tempfile.mkdtemp(), "chat.safetensors")
            >>> cache.save(path)
            >>> StreamingCache.load(path, model).seen_tokens
            [9]
        """
        return cls._loaded(lambda: read(path), model, on_evict)

    @classmethod
    def _loaded(cls, opened: Callable[[], Snapshot], model: nn.Module, on_evict: OnEvict) -> Self:
        cache: Self | None = None
        try:
            try:
                snapshot = opened()
                cache = cls(model, **snapshot.settings, on_evict=on_evict)
                cache._check(snapshot)
                check(snapshot.state, cache._stream.pools, cache._states.layers)
            except Exception as error:
                if isinstance(model, nn.Module):
                    check_agreement(model, error)  # the other ranks wait to be told
                raise
            check_agreement(model, position(snapshot))
            cache._go_on_from(snapshot.state)
        except BaseException:
            if cache is not None:
                cache._finalizer()  # now: the exception's traceback refers to the cache
            raise
        return cache

    def _go_on_from(self, state: State) -> None:
        with self._idle("be restored") as stream:
            decoder = self._decoder()
            stream.adopt(placed(state, layer_devices(decoder, decoder.config.num_hidden_layers)))
            self._news = News()  # of what was undone

    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self._decoder(), [pool.rotary.inv_freq for pool in self._stream.pools])

    def _decoder(self) -> PreTrainedModel:
        decoder = self._checks.decoder()
        if decoder is None:
            raise RuntimeError("The model of this StreamingCache is gone, and its content means nothing to others.")
        return decoder

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "A StreamingCache serves one model and cannot be pickled or copied without it: use cache.save(path) and "
            "StreamingCache.load(path, model), snapshot() and restore(), or copy.deepcopy(cache)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model: nn.Module = self._model() or self._decoder()
        model = memo.get(id(model), model)  # copied together: the copies serve each other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # given when the original was made
            twin = type(self)(model, **self._settings, on_evict=self._on_evict)
        memo[id(self)] = twin
        with self._idle("be copied") as stream:
            twin._go_on_from(stream.state.cloned())  # noqa: SLF001 - the copy is of our own class
        return twin
