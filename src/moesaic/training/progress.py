"""One line of progress: rewritten in place on a terminal, now and then a new line elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["ProgressLine"]


class ProgressLine:
    """Shows `label  done/total  facts  ETA` on stderr at most every 0.2 s, or every 30 s where stderr is no terminal.

    `total` None means unknown. Use as a context manager; a non-terminal stays silent if the work ends within 30 s.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        unit: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._clock = clock
        self._start = self._shown = clock()
        self._first: int | None = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Clear the line; whatever is printed next starts in column one."""
        if self._live:
            self._write("\r\x1b[K")

    def update(self, done: int, facts: str = "") -> None:
        """Report `done` of `total`; `facts` is shown as given. Cheap when it is not time to show anything."""
        now = self._clock()
        if self._first is None:
            # Work restored from a checkpoint must not count as speed.
            self._first, self._start = done, now
        if now - self._shown < (0.2 if self._live else 30.0):
            return
        self._shown = now
        line = "  ".join(part for part in (self.label, self._count(done), facts, self._eta(done, now)) if part)
        self._write(f"\r{line[:119]}\x1b[K" if self._live else f"{line}\n")

    def _count(self, done: int) -> str:
        if self.total is None:
            return f"{done:,} {self.unit}".rstrip()
        return f"{done:,}/{self.total:,} {self.unit}".rstrip() + f" ({done / max(1, self.total):.0%})"

    def _eta(self, done: int, now: float) -> str:
        assert self._first is not None
        if self.total is None or done <= self._first:
            return ""
        seconds = round((now - self._start) / (done - self._first) * (self.total - done))
        return f"ETA {seconds // 60}:{seconds % 60:02d}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
