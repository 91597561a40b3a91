"""Fresh processes: an answer, or the reason why there is none; and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import tasks

from moesaic.bench import worker
from moesaic.bench.worker import run_fresh

LONG = 60.0


@pytest.fixture(autouse=True)
def light_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real preload takes seconds and is not what these tests are about."""
    monkeypatch.setattr(worker, "PRELOAD", "bench.tasks")
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.2)


def alive(pid: int) -> bool:
    """Whether it runs; a dead process that nobody has collected does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 30 s in vain")


def test_each_answer_comes_from_another_process() -> None:
    results = [run_fresh(tasks.answer, number, timeout_seconds=LONG).result for number in range(2)]
    assert [result and result["request"] for result in results] == [0, 1]
    pids = {result["pid"] for result in results if result}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert all(result["leader"] for result in results if result)


@pytest.mark.parametrize(
    ("task", "reason", "words"),
    [
        (tasks.refuse, "refused", "k=9 exceeds 8"),
        (tasks.fail, "error", "KeyError: 'a bug'"),
        (tasks.run_out_of_memory, "out_of_memory", "can't allocate memory"),
        (tasks.be_killed, "out_of_memory", "killed from outside"),
        (tasks.leave, "crashed", "exit code 3"),
    ],
)
def test_failures_have_reasons(task: worker.Task, reason: str, words: str) -> None:
    outcome = run_fresh(task, None, timeout_seconds=LONG)
    assert outcome.result is None
    assert outcome.failure is not None
    assert outcome.failure.plain()["reason"] == reason
    assert words in outcome.failure.message


def test_a_process_that_never_ends_is_killed(tmp_path: Path) -> None:
    outcome = run_fresh(tasks.never_end, str(tmp_path), timeout_seconds=2.0)
    assert outcome.failure is not None
    assert outcome.failure.reason == "timeout"
    assert "bench.timeout_seconds" in outcome.failure.message
    if (tmp_path / "pid").exists():  # on a very busy machine it may not even have begun
        wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


SCRIPT = """
import sys
sys.path[:0] = [{src!r}, {tests!r}]
from bench import tasks
from moesaic.bench import worker
worker.PRELOAD, worker.PATIENCE_SECONDS = "bench.tasks", 0.2
if __name__ == "__main__":
    worker.run_fresh(tasks.never_end, {folder!r}, timeout_seconds=600)
"""


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_outlives_an_interrupted_parent(tmp_path: Path, ending: signal.Signals, code: int) -> None:
    tests = Path(__file__).parents[1]
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT.format(src=str(tests.parent / "src"), tests=str(tests), folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    parent.send_signal(ending)
    assert parent.wait(timeout=30) == code
    wait_for(lambda: not alive(child))
