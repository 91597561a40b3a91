"""One writer per stage: a lease file with a heartbeat, that outlives neither its process nor its host for long.

A lease is a small JSON file under the store's `.locks`. It is created, taken over and removed only inside a guard, a
file lock that is held for milliseconds and that the system releases when its process dies, so that two processes never
both believe that they took a lease over. The owner touches the file now and then. A waiter takes over at once where the
owner was a process of this host that is gone, and after `stale_after_s` without a touch where it was on another host;
clocks of two hosts are never compared.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock

from moesaic.config.strict import strict_object, to_plain
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.status import utc_now

__all__ = ["Lease", "LeaseLostError", "Owner", "hold_lease", "live_owner"]

# The guard between threads: where file locks are emulated by byte ranges (NFS), they hold between processes only.
_THREADS = threading.Lock()


class LeaseLostError(RuntimeError):
    """Another process has taken this stage over, because this one gave no sign of life for too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who holds a lease. `process_start` tells a process from a later one with the same number."""

    token: str
    host: str
    boot: str
    pid: int
    process_start: float
    since_utc: str

    @classmethod
    def me(cls) -> Owner:
        """Return this process as a new owner."""
        return cls(
            token=uuid.uuid4().hex,
            host=platform.node(),
            boot=_boot_id(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or 0.0,
            since_utc=utc_now(),
        )

    @property
    def title(self) -> str:
        """How messages call the owner."""
        return f"process {self.pid} on {self.host} (since {self.since_utc})"

    def is_gone(self) -> bool:
        """Tell whether the owner is known to be dead; False where it is on another host and may live."""
        if self.host != platform.node():
            return False
        return self.boot != _boot_id() or _process_start(self.pid) != self.process_start


class Lease:
    """A lease that is held: a thread keeps its file fresh and calls `on_beat`; `check` raises once it is lost.

    `waited` tells whether somebody else held it first. Where the holder is the main thread, a loss interrupts it.
    """

    def __init__(self, path: Path, owner: Owner, *, title: str, waited: bool, heartbeat_s: float) -> None:
        self.path = path
        self.owner = owner
        self.title = title
        self.waited = waited
        self.on_beat: Callable[[], None] = _nothing
        self._heartbeat_s = heartbeat_s
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {title}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken the stage over."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLostError where the lease is no longer ours."""
        if self.lost or not self._is_ours():
            raise LeaseLostError(f"{self.title} was taken over by another process; this one stops writing to it")

    def end(self) -> None:
        """Stop the heartbeat and give the lease up, unless it has become somebody else's."""
        self._ended.set()
        self._thread.join()
        with _guard(self.path):
            if self._is_ours():
                self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._lost.is_set() and not self._ended.wait(self._heartbeat_s):
            # A file system that is away for a moment is no loss; a touch just after another's take-over does no harm.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self.path)
                    self.on_beat()
                else:
                    self._lost.set()
        if self.lost and self._in_main_thread:
            _thread.interrupt_main()

    def _is_ours(self) -> bool:
        owner = _read(self.path)
        return owner is not None and owner.token == self.owner.token


@contextlib.contextmanager
def hold_lease(
    path: Path,
    *,
    title: str,
    announce: Callable[[str], None],
    heartbeat_s: float,
    stale_after_s: float,
    poll_s: float,
) -> Iterator[Lease]:
    """Wait until `path` is free or its owner is gone, then hold it for the block.

    `title` names in messages what it protects. `announce` gets a line when there
    is somebody to wait for, and one when a lease is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    watch = _Watch(path, stale_after_s)
    announced = ""
    while (owner := _try_take(path, watch, title, announce)) is None:
        assert watch.owner is not None
        if watch.owner.token != announced:
            announce(f"waiting for {title}: {watch.owner.title} is computing it")
            announced = watch.owner.token
        time.sleep(poll_s)
    lease = Lease(path, owner, title=title, waited=bool(announced), heartbeat_s=heartbeat_s)
    try:
        yield lease
    finally:
        lease.end()


def live_owner(path: Path) -> Owner | None:
    """Return who holds `path`, None where nobody does or the owner is known to be dead."""
    owner = _read(path)
    return None if owner is None or owner.is_gone() else owner


class _Watch:
    """What a waiter has seen of the lease: its owner, and when, on the waiter's own clock, it last changed."""

    def __init__(self, path: Path, stale_after_s: float) -> None:
        self.path = path
        self.stale_after_s = stale_after_s
        self.owner: Owner | None = None
        self._mark: tuple[str, int] | None = None
        self._seen_s = time.monotonic()

    def look(self) -> Owner | None:
        self.owner = _read(self.path)
        mark = (self.owner.token, _mtime_ns(self.path)) if self.owner else None
        if mark != self._mark:
            self._mark, self._seen_s = mark, time.monotonic()
        return self.owner

    def why_stale(self) -> str | None:
        assert self.owner is not None
        if self.owner.is_gone():
            return "which has ended"
        silent_s = time.monotonic() - self._seen_s
        same_host = self.owner.host == platform.node()
        return None if same_host or silent_s < self.stale_after_s else f"which has been silent for {silent_s:.0f} s"


def _try_take(path: Path, watch: _Watch, title: str, announce: Callable[[str], None]) -> Owner | None:
    with _guard(path):
        other = watch.look()
        if other is not None:
            why = watch.why_stale()
            if why is None:
                return None
            announce(f"taking {title} over from {other.title}, {why}")
        owner = Owner.me()
        write_json_atomic(path, to_plain(owner, Owner))
        return owner


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    with _THREADS, FileLock(path.with_name("guard")):
        yield


def _read(path: Path) -> Owner | None:
    """Read a lease; one without sense counts as none, since leases are written in one step. Raises: OSError."""
    try:
        return strict_object(Owner, json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return None


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _process_start(pid: int) -> float | None:
    """Return a number that no other process with this pid has on this boot; None where there is none, or a zombie.

    Linux counts it in clock ticks since boot; psutil's time of day would move with every correction of the clock.
    """
    try:
        state, *counts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else float(counts[18])
    except FileNotFoundError:
        return (
            None
            if Path("/proc/self/stat").exists() or not psutil.pid_exists(pid)
            else psutil.Process(pid).create_time()
        )
    except ProcessLookupError:
        return None


def _nothing() -> None:
    """What a lease does on its beat until its holder says otherwise."""


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
