"""Run one measurement in a process of its own, and turn whatever happens to that process into an answer.

Processes come from a fork server that has everything imported: a fresh one costs milliseconds, not seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

__all__ = ["Failure", "Outcome", "run_fresh", "start_server"]

PRELOAD = "moesaic.bench.preload"
PATIENCE_SECONDS = 5  # between asking a process to end and killing it
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "out of memory")

Task = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a measurement has no result: `reason` is one of out_of_memory, timeout, crashed, refused, error."""

    reason: str
    message: str

    def plain(self) -> dict[str, str]:
        """As it stands in a record."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a fresh process answered: a result or a failure."""

    result: dict[str, Any] | None
    failure: Failure | None


def start_server() -> None:
    """Start the fork server now, so that its imports (seconds) run beside other work. The environment it starts with
    is the one that every later process sees.
    """
    from multiprocessing import forkserver

    _context()
    forkserver.ensure_running()


def run_fresh(task: Task, request: Any, *, timeout_seconds: float) -> Outcome:
    """What `task(request)` returns in a fresh process, or why it returned nothing.

    `task` is a module-level function; request and result travel by pickle. The process, and all that it started, is
    killed after `timeout_seconds`, and when this one is interrupted or dies.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task, request))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_seconds):
            message = f"no result after {timeout_seconds:g} s; raise bench.timeout_seconds or time less."
            return Outcome(result=None, failure=Failure(reason="timeout", message=message))
        outcome: Outcome = receiver.recv()
        process.join(PATIENCE_SECONDS)
        return outcome
    except EOFError:
        process.join(PATIENCE_SECONDS)
        return Outcome(result=None, failure=_death(process.exitcode))
    finally:
        _end(process)
        receiver.close()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


def _answer(sender: Connection, task: Task, request: Any) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        outcome = Outcome(result=task(request), failure=None)
    except Exception as error:
        outcome = Outcome(result=None, failure=_failure(error))
    sender.send(outcome)


def _failure(error: Exception) -> Failure:
    """Memory on a CPU ends in a plain RuntimeError, so its words decide."""
    message = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError) or any(words in message.lower() for words in OUT_OF_MEMORY_WORDS):
        return Failure(reason="out_of_memory", message=message)
    if isinstance(error, ValueError):
        return Failure(reason="refused", message=message)
    return Failure(reason="error", message="".join(traceback.format_exception(error)))


def _death(exitcode: int | None) -> Failure:
    if exitcode == -signal.SIGKILL:
        return Failure(reason="out_of_memory", message="the process was killed from outside, most likely for memory.")
    return Failure(reason="crashed", message=f"the process ended without a result (exit code {exitcode}).")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _end(process: ForkServerProcess) -> None:
    """End the process's whole group. Before it became the leader of one, there is only itself to end."""
    if process.pid is None or not process.is_alive():
        return
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            process.kill()
        process.join(PATIENCE_SECONDS)
        if not process.is_alive():
            return
