"""The store: computes each stage once, whoever asks, and keeps what it made under the stage's identity.

    root/<stage>/<label>-<identity>/            a finished stage; it is never changed
    root/<stage>/<label>-<identity>.partial/    one in progress, or one that failed and can be continued
    root/<stage>/<label>-<identity>.corrupt-1/  a finished one whose files no longer match their manifest

Beside the output of a stage lie `config.json` (all that decided it), `status.json`, `manifest.json`, and after a
failure `traceback.txt`. A folder becomes a finished one by one rename, when every file of it is on the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.runs.attempt import TRACEBACK_FILE, Attempt, StageFailedError, partial_folder
from moesaic.runs.lease import Lease, hold_lease, live_owner
from moesaic.runs.manifest import damage
from moesaic.runs.record import StageUse
from moesaic.runs.stage import Stage, in_order
from moesaic.runs.status import Status, reason_of

__all__ = ["StageFailedError", "StageState", "Store"]

StateName = Literal["done", "running", "failed", "interrupted", "missing"]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageState:
    """What a dry run says of one stage. `note` is the reason of a failure, or who computes it."""

    title: str
    identity: str
    state: StateName
    folder: Path
    note: str = ""


class Store:
    """Stages under one root folder, shared by any number of threads and processes, also on several hosts.

    `announce` gets one line for each thing that a person would want to know. `stale_after_s` is how long an owner on
    another host may be silent before its stage is taken over; it must exceed the longest call that holds Python's lock.
    """

    def __init__(
        self,
        root: Path,
        *,
        announce: Callable[[str], None] = _to_stderr,
        heartbeat_s: float = 10.0,
        stale_after_s: float = 600.0,
        poll_s: float = 0.5,
    ) -> None:
        self.root = Path(root)
        self._announce = announce
        self._heartbeat_s = heartbeat_s
        self._stale_after_s = stale_after_s
        self._poll_s = poll_s
        self._known: set[str] = set()
        self._computed: set[str] = set()

    def folder(self, stage: Stage) -> Path:
        """Return where the finished output of `stage` is, or will be."""
        return self.root / stage.name / stage.folder_name

    def ensure(self, stage: Stage) -> Path:
        """Return the folder of `stage`, computed now (its parents first) unless it is there and undamaged.

        Raises: StageFailedError where computing failed, here or in the process that was waited for;
        KeyboardInterrupt and SystemExit as they came, once they are noted in the status.
        """
        if self._is_whole(stage):
            return self.folder(stage)
        parents = tuple(self.ensure(parent) for parent in stage.parents)
        with self._lease(stage) as lease:
            if self._is_whole(stage):
                return self.folder(stage)
            self._refuse_shared_failure(stage, lease)
            self._set_aside(stage)
            Attempt(stage, self.folder(stage), lease, self._announce).run(parents)
        self._known.add(stage.title)
        self._computed.add(stage.title)
        return self.folder(stage)

    def status(self, stage: Stage) -> Status | None:
        """Return what is known of the last try at `stage`, finished or not."""
        return Status.read(self.folder(stage)) or Status.read(partial_folder(self.folder(stage)))

    def explain(self, *stages: Stage) -> list[StageState]:
        """Return the state of `stages` and all they need, parents first, without computing or hashing anything."""
        return [self._state(each) for each in in_order(*stages)]

    def uses(self, *stages: Stage) -> list[StageUse]:
        """Return what `stages` and all they need have cost, parents first; `cached`: not computed by this store."""
        statuses = ((each, self.status(each)) for each in in_order(*stages))
        return [
            StageUse(
                stage=each.name,
                identity=each.identity,
                wall_seconds=status.usage.wall_seconds,
                cpu_seconds=status.usage.cpu_seconds,
                peak_rss_bytes=status.usage.peak_rss_bytes,
                cached=each.title not in self._computed,
            )
            for each, status in statuses
            if status is not None
        ]

    def _is_whole(self, stage: Stage) -> bool:
        """Tell whether `stage` is finished and undamaged; its files are hashed once per store."""
        folder = self.folder(stage)
        if stage.title in self._known:
            return folder.is_dir()
        if not folder.is_dir() or _problem(folder) is not None:
            return False
        self._known.add(stage.title)
        self._announce(f"cached    {stage.title}")
        return True

    def _refuse_shared_failure(self, stage: Stage, lease: Lease) -> None:
        """Let the failure of the process that was waited for count here too: the same computation would fail again."""
        status = self.status(stage)
        if lease.waited and status is not None and status.state == "failed" and status.reason != "interrupted":
            noted = partial_folder(self.folder(stage)) / TRACEBACK_FILE
            raise StageFailedError(stage.title, status.reason or "error", status.message or "", noted)

    def _set_aside(self, stage: Stage) -> None:
        folder = self.folder(stage)
        if folder.exists():
            free = (folder.with_name(f"{folder.name}.corrupt-{n}") for n in itertools.count(1))
            aside = next(path for path in free if not path.exists())
            self._announce(
                f"warning: {stage.title} is damaged ({_problem(folder)}); kept as {aside.name}, computing it again"
            )
            os.rename(folder, aside)

    def _state(self, stage: Stage) -> StageState:
        folder = self.folder(stage)
        status = self.status(stage)
        owner = live_owner(self._lease_path(stage))
        state: StateName = "missing"
        note = ""
        if folder.is_dir():
            state, note = (
                ("done", "") if status and status.state == "done" else ("missing", "damaged, will be computed again")
            )
        elif owner is not None:
            state, note = "running", owner.title
        elif status is not None:
            state = "failed" if status.state == "failed" else "interrupted"
            note = f"{status.reason}: {status.message}" if status.reason else "killed; will be continued"
        return StageState(title=stage.title, identity=stage.identity, state=state, folder=folder, note=note)

    @contextlib.contextmanager
    def _lease(self, stage: Stage) -> Iterator[Lease]:
        with contextlib.ExitStack() as stack:
            try:
                lease = stack.enter_context(
                    hold_lease(
                        self._lease_path(stage),
                        title=stage.title,
                        announce=self._announce,
                        heartbeat_s=self._heartbeat_s,
                        stale_after_s=self._stale_after_s,
                        poll_s=self._poll_s,
                    )
                )
            except OSError as error:
                raise StageFailedError(stage.title, reason_of(error), str(error), None) from error
            yield lease

    def _lease_path(self, stage: Stage) -> Path:
        return self.root / ".locks" / stage.name / f"{stage.folder_name}.json"


def _problem(folder: Path) -> str | None:
    status = Status.read(folder)
    return "it has no status of a finished stage" if status is None or status.state != "done" else damage(folder)
