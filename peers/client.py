"""Client of `worker.py`: sends requests to a peer's process, one JSON object per line, with a timeout."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

TIMEOUT: Final = 1200.0  # for one answer [s]; the reference needs minutes for 2,000 tokens


class Client:
    """A peer's process; after it has exited, every answer is an error with the reason."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """Start the process.

        Args:
            command: program and arguments.
            log: file for its standard error.
            environment: variables to add to those of this process.
            timeout: for one answer [s].
        """
        self.timeout = timeout
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Request a measurement.

        Args:
            do: its name.
            **arguments: its arguments, as values of JSON.

        Returns:
            `{"result": ...}`, `{"refused": why}` or `{"error": what}`.
        """
        try:
            self._write(json.dumps({"do": do, **arguments}) + "\n")
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            self._process.kill()
            return {"error": f"no answer to {do} within {self.timeout:.0f} s"}
        except (OSError, ValueError):
            line = None
        if line is None:
            self._lines.put(None)  # for the next request
            return {"error": f"process ended: {self._last_line()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, text: str) -> None:
        if self._process.stdin is None:
            raise OSError("The process has no standard input.")
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _read(self) -> None:
        """Put lines on the queue, and None after the last one."""
        if self._process.stdout is not None:
            with self._process.stdout as stream:
                for line in stream:
                    self._lines.put(line)
        self._lines.put(None)

    def _last_line(self) -> str:
        """Return the last line that the process printed to standard error."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no message"
