"""status.json: what happened to a stage, written by the stage itself."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object, to_plain
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.usage import Usage

__all__ = ["FailureReason", "Status", "reason_of", "utc_now"]

FailureReason = Literal["diverged", "out_of_memory", "disk_full", "interrupted", "error"]

STATUS_FILE = "status.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """State of one stage. `usage` and `restarts` count over all tries, also those that were killed."""

    state: Literal["running", "done", "failed"]
    stage: str
    identity: str
    version: int
    started_utc: str  # of the first try
    updated_utc: str
    ended_utc: str | None = None
    reason: FailureReason | None = None
    message: str | None = None
    usage: Usage = field(default_factory=Usage)
    restarts: int = 0
    host: str
    pid: int
    code_revision: str

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """Return the status in `folder`, None where there is none or none that can be read."""
        try:
            return strict_object(cls, json.loads((folder / STATUS_FILE).read_text()))
        except (OSError, ConfigError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def write(self, folder: Path) -> None:
        """Replace the status in `folder` in one step."""
        write_json_atomic(folder / STATUS_FILE, to_plain(self, Status))


def reason_of(error: BaseException) -> FailureReason:
    """Return the class of failure that `error`, or what it was raised from, stands for."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    if _is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, ArithmeticError) and not isinstance(error, ZeroDivisionError | OverflowError):
        return "diverged"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return reason_of(cause) if cause is not None else "error"


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch raises a plain RuntimeError on the CPU, and its own class, known here by its name, on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def utc_now() -> str:
    """Return the time in UTC to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
