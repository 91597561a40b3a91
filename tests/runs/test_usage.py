"""Usage adds up; the clock measures this process."""

from __future__ import annotations

import time

from moesaic.runs.usage import Clock, Usage


def test_seconds_add_up_and_the_peak_is_the_highest() -> None:
    one = Usage(wall_seconds=1.0, cpu_seconds=2.0, peak_rss_bytes=30)
    two = Usage(wall_seconds=10.0, cpu_seconds=20.0, peak_rss_bytes=3)
    assert one.plus(two) == Usage(wall_seconds=11.0, cpu_seconds=22.0, peak_rss_bytes=30)


def test_the_clock_counts_on_from_what_was_used_before() -> None:
    clock = Clock(Usage(wall_seconds=100.0, cpu_seconds=100.0))
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    used = clock.read()
    assert used.wall_seconds > 100.0
    assert used.cpu_seconds > 100.0


def test_the_peak_sees_memory_that_was_given_back() -> None:
    clock = Clock()
    before = clock.read().peak_rss_bytes
    block = bytearray(b"x") * (64 * 2**20)
    del block
    assert clock.read().peak_rss_bytes - before > 32 * 2**20
