"""Leases: who may take one over, and what the old owner then notices."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.config.strict import to_plain
from moesaic.runs import lease as lease_module
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.engine import Store
from moesaic.runs.lease import Lease, LeaseLostError, Owner, hold_lease, live_owner
from moesaic.runs.stage import Stage
from moesaic.runs.status import Status


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.sleeps += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(lease_module.time, "monotonic", fake.monotonic)
    monkeypatch.setattr(lease_module.time, "sleep", fake.sleep)
    return fake


def write_owner(path: Path, **changes: object) -> Owner:
    owner = replace(Owner.me(), **changes)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, to_plain(owner, Owner))
    return owner


def hold(path: Path, lines: list[str]) -> Lease:
    with hold_lease(
        path, title="cut/x", announce=lines.append, heartbeat_s=60.0, stale_after_s=100.0, poll_s=10.0
    ) as lease:
        return lease


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pid": dead_pid()}, id="process gone"),
        pytest.param({"process_start": 1.0}, id="number given to another process"),
        pytest.param({"boot": "another"}, id="host restarted"),
    ],
)
def test_a_dead_owner_on_this_host_is_replaced_at_once(
    tmp_path: Path, clock: FakeClock, changes: dict[str, object]
) -> None:
    path, lines = tmp_path / "x.json", []
    owner = write_owner(path, **changes)
    assert live_owner(path) is None
    hold(path, lines)
    assert clock.sleeps == 0
    assert lines == [f"taking cut/x over from {owner.title}, which has ended"]


def test_a_zombie_counts_as_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    mine = replace(Owner.me(), pid=process.pid, process_start=1.0)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert mine.is_gone()
    process.wait()


def test_an_owner_on_another_host_is_replaced_when_silent_for_long(tmp_path: Path, clock: FakeClock) -> None:
    path, lines = tmp_path / "x.json", []
    write_owner(path, host="elsewhere", pid=7)
    assert live_owner(path) is not None
    hold(path, lines)
    assert "waiting for cut/x: process 7 on elsewhere" in lines[0]
    assert "silent for 100 s" in lines[1]
    assert len(lines) == 2


def test_a_touch_from_another_host_starts_the_silence_anew(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / "x.json", []
    write_owner(path, host="elsewhere")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now_s <= 500:
            os.utime(path, ns=(0, int(clock.now_s)))

    monkeypatch.setattr(lease_module.time, "sleep", sleep)
    hold(path, lines)
    assert clock.now_s == pytest.approx(600)


def test_a_live_owner_on_this_host_is_never_replaced(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / "x.json", []
    write_owner(path)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now_s >= 10_000:
            path.unlink()

    monkeypatch.setattr(lease_module.time, "sleep", sleep)
    hold(path, lines)
    assert clock.now_s >= 10_000
    assert len(lines) == 1


def test_a_lease_without_sense_is_free(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    assert live_owner(path) is None
    hold(path, [])
    assert clock.sleeps == 0


def test_a_lease_that_became_anothers_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with hold_lease(path, title="cut/x", announce=print, heartbeat_s=60.0, stale_after_s=100.0, poll_s=10.0) as lease:
        lease.check()
        write_owner(path, host="elsewhere")
        with pytest.raises(LeaseLostError, match="cut/x was taken over"):
            lease.check()
    assert path.exists()


def test_a_stage_that_was_taken_over_stops_and_writes_nothing_more(tmp_path: Path) -> None:
    store = Store(tmp_path, heartbeat_s=0.02, announce=lambda line: None)

    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        write_owner(next((tmp_path / ".locks" / "cut").glob("*.json")), host="elsewhere")
        for _ in range(1000):
            time.sleep(0.05)

    stage = Stage(name="cut", label="x", config={}, compute=compute)
    with pytest.raises(LeaseLostError):
        store.ensure(stage)
    status = store.status(stage)
    assert status is not None
    assert status.state == "running"
    assert not store.folder(stage).exists()


def test_the_status_of_a_stage_is_never_half_written(tmp_path: Path) -> None:
    assert Status.read(tmp_path) is None
    (tmp_path / "status.json").write_text('{"state": "do')
    assert Status.read(tmp_path) is None
