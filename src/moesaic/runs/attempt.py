"""One try at computing a stage, from the first file in its partial folder to the rename, or to a noted failure."""

from __future__ import annotations

import os
import platform
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moesaic.runs.atomic import remove_temporaries, sync_folder, write_json_atomic, write_text_atomic
from moesaic.runs.environment import code_revision
from moesaic.runs.lease import Lease, LeaseLostError
from moesaic.runs.manifest import write_manifest
from moesaic.runs.stage import Stage
from moesaic.runs.status import FailureReason, Status, reason_of, utc_now
from moesaic.runs.usage import Clock

__all__ = ["TRACEBACK_FILE", "Attempt", "StageFailedError", "partial_folder"]

CONFIG_FILE = "config.json"
TRACEBACK_FILE = "traceback.txt"


class StageFailedError(RuntimeError):
    """A stage could not be computed: which, the class of failure, its message, and the file with the traceback."""

    def __init__(self, title: str, reason: FailureReason, message: str, traceback_path: Path | None) -> None:
        super().__init__(title, reason, message, traceback_path)
        self.title = title
        self.reason = reason
        self.message = message
        self.traceback_path = traceback_path

    def __str__(self) -> str:
        return f"{self.title} failed ({self.reason}): {self.message}"


def partial_folder(folder: Path) -> Path:
    """Return where the stage that will end in `folder` is worked on."""
    return folder.with_name(f"{folder.name}.partial")


class Attempt:
    """One try; `run` once."""

    def __init__(self, stage: Stage, folder: Path, lease: Lease, announce: Callable[[str], None]) -> None:
        self.stage = stage
        self.folder = folder
        self.partial = partial_folder(folder)
        self._lease = lease
        self._announce = announce
        before = Status.read(self.partial)
        self._clock = Clock(before.usage) if before else Clock()
        self._status = self._first_status(before)
        self._writing = threading.Lock()
        self._beating = False

    def run(self, parents: tuple[Path, ...]) -> None:
        """Compute the stage and move its folder to its place.

        Raises: StageFailedError from the error; KeyboardInterrupt and SystemExit themselves; LeaseLostError where
        another process took the stage over. The partial folder stays, with the status `failed`.
        """
        try:
            self._begin()
            self.stage.compute(self.partial, parents)
            self._publish()
        except BaseException as error:
            self._stop_beats()
            if self._lease.lost or isinstance(error, LeaseLostError):
                raise LeaseLostError(
                    f"{self.stage.title} was taken over by another process; this one has stopped"
                ) from error
            failure = self._note_failure(error)
            if isinstance(error, Exception):
                raise failure from error
            raise

    def _first_status(self, before: Status | None) -> Status:
        now = utc_now()
        return Status(
            state="running",
            stage=self.stage.name,
            identity=self.stage.identity,
            version=self.stage.version,
            started_utc=before.started_utc if before else now,
            updated_utc=now,
            usage=self._clock.before,
            restarts=before.restarts + 1 if before else 0,
            host=platform.node(),
            pid=os.getpid(),
            code_revision=code_revision(),
        )

    def _begin(self) -> None:
        again = f", try {self._status.restarts + 1}" if self._status.restarts else ""
        self._announce(f"computing {self.stage.title}{again}")
        self.partial.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.partial)
        (self.partial / TRACEBACK_FILE).unlink(missing_ok=True)
        write_json_atomic(self.partial / CONFIG_FILE, self.stage.frozen())
        self._status.write(self.partial)
        self._beating = True
        self._lease.on_beat = self._beat

    def _publish(self) -> None:
        self._stop_beats()
        self._lease.check()
        write_manifest(self.partial)
        self._write(replace(self._now(), state="done", ended_utc=utc_now()))
        sync_folder(self.partial)
        self._lease.check()
        os.rename(self.partial, self.folder)
        sync_folder(self.folder.parent)
        self._announce(f"finished  {self.stage.title} in {self._status.usage.wall_seconds:.1f} s")

    def _note_failure(self, error: BaseException) -> StageFailedError:
        reason = reason_of(error)
        message = _message(error)
        path: Path | None = self.partial / TRACEBACK_FILE
        try:
            self._write(replace(self._now(), state="failed", ended_utc=utc_now(), reason=reason, message=message))
            write_text_atomic(self.partial / TRACEBACK_FILE, "".join(traceback.format_exception(error)))
        except OSError as second:
            # A full disk takes no notes either; the status then still says "running" of a process that is gone.
            self._announce(f"warning: the failure of {self.stage.title} could not be noted: {second}")
            path = None
        return StageFailedError(self.stage.title, reason, message, path)

    def _now(self) -> Status:
        return replace(self._status, updated_utc=utc_now(), usage=self._clock.read())

    def _beat(self) -> None:
        """Keep what was used so far on the disk, so that a kill does not lose it."""
        with self._writing:
            if self._beating:
                self._status = self._now()
                self._status.write(self.partial)

    def _stop_beats(self) -> None:
        with self._writing:
            self._beating = False

    def _write(self, status: Status) -> None:
        self._status = status
        status.write(self.partial)


def _message(error: BaseException) -> str:
    """The error's own words; its class as well, unless it was written for the user (ValueError) or says it itself."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError | ArithmeticError | OSError) else f"{type(error).__name__}: {text}"
