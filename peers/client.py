"""Client of `worker.py`: sends requests to a peer's process and waits for each answer, with a timeout."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
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
        """Start the process with the number of its end of a pipe as the last argument; what it prints goes to `log`."""
        self.timeout = timeout
        self._log = log
        self._pipe, other = multiprocessing.Pipe()
        with log.open("w", encoding="utf-8") as printed, other:
            self._process = subprocess.Popen(
                [*command, str(other.fileno())],
                stdout=printed,
                stderr=printed,
                env={**os.environ, **(environment or {})},
                pass_fds=[other.fileno()],
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Request a measurement; return `{"result": ...}`, `{"refused": why}` or `{"error": what}`."""
        try:
            self._pipe.send({"do": do, **arguments})
            if self._pipe.poll(self.timeout):
                answer: dict[str, Any] = self._pipe.recv()
                return answer
        except (OSError, EOFError):
            return {"error": f"process ended: {self._last_line()}"}
        self._process.kill()
        return {"error": f"no answer to {do} within {self.timeout:.0f} s"}

    def close(self) -> None:
        """End the process and wait for it."""
        self._pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_line(self) -> str:
        """Return the last line that the process printed, progress bars apart."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        lines = [line for line in lines if "%|" not in line]
        return lines[-1][:200] if lines else "no message"
