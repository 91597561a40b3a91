"""What a computation used: wall seconds, CPU seconds, peak memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Clock", "Usage"]

PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the peak resident set size


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Seconds add up over tries; the peak is the highest."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0  # this process with all its threads, and the children that have ended
    peak_rss_bytes: int = 0  # of this process

    def plus(self, other: Usage) -> Usage:
        """Return what both used together."""
        return Usage(
            wall_seconds=self.wall_seconds + other.wall_seconds,
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
        )


@dataclass(slots=True)
class Clock:
    """Measures the process from the moment it is made, on top of what was used `before`.

    Two stages computed at once in threads of one process each see the CPU seconds and the memory of both.
    """

    before: Usage = field(default_factory=Usage)
    _wall_start: float = field(default_factory=time.monotonic)
    _cpu_start: float = field(default_factory=lambda: _cpu_seconds())

    def __post_init__(self) -> None:
        _reset_peak()

    def read(self) -> Usage:
        """Return what was used up to now, `before` included."""
        wall_seconds = time.monotonic() - self._wall_start
        cpu_seconds = _cpu_seconds() - self._cpu_start
        return self.before.plus(
            Usage(wall_seconds=wall_seconds, cpu_seconds=cpu_seconds, peak_rss_bytes=_peak_rss_bytes())
        )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _reset_peak() -> None:
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the process's whole life


def _peak_rss_bytes() -> int:
    try:
        lines = PROCESS_STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
