"""The store between processes: kills, locks, two of them at one stage. Real processes, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic.runs.attempt import partial_folder
from moesaic.runs.engine import Store
from moesaic.runs.stage import Stage

WORKER = Path(__file__).with_name("worker.py")
STAGE = Stage(name="count", label="slow", config={"steps": 20}, compute=lambda folder, parents: None)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def one(mode: str = "count") -> subprocess.Popen[str]:
        command = [sys.executable, str(WORKER), str(tmp_path), mode]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, lines: int = 1) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def tries(root: Path) -> int:
    return len((root / "tries.txt").read_text().splitlines())


def steps_of(root: Path) -> Path:
    return partial_folder(Store(root).folder(STAGE)) / "steps.txt"


def wait_for_waiter(process: subprocess.Popen[str]) -> str:
    """Return the line by which a process says that it waits."""
    assert process.stderr is not None
    return next(line for line in process.stderr if line.startswith("waiting for"))


def test_two_processes_compute_one_stage_once_and_the_second_says_for_whom_it_waits(
    start: Start, tmp_path: Path
) -> None:
    first = start()
    wait_for(tmp_path / "tries.txt")
    second = start()
    assert f"waiting for {STAGE.title}: process {first.pid} on " in wait_for_waiter(second)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs == [f"{Store(tmp_path).folder(STAGE)}\n"] * 2
    assert tries(tmp_path) == 1


def test_the_failure_of_the_process_that_was_waited_for_counts_for_the_waiter(start: Start, tmp_path: Path) -> None:
    first = start("fail")
    wait_for(tmp_path / "tries.txt")
    second = start("fail")
    wait_for_waiter(second)
    (tmp_path / "go").touch()
    assert (first.wait(60), second.wait(60)) == (1, 1)
    assert tries(tmp_path) == 1
    assert start("fail").wait(60) == 1
    assert tries(tmp_path) == 2


def test_kill_9_leaves_nothing_that_looks_finished_and_the_next_run_continues(start: Start, tmp_path: Path) -> None:
    victim = start()
    wait_for(steps_of(tmp_path), lines=2)
    victim.kill()
    victim.wait()
    store = Store(tmp_path)
    assert not store.folder(STAGE).exists()
    assert [state.state for state in store.explain(STAGE)] == ["interrupted"]

    (tmp_path / "go").touch()
    survivor = start()
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode == 0
    assert "which has ended" in err
    assert (store.folder(STAGE) / "steps.txt").read_text().split() == [str(step) for step in range(20)]
    status = store.status(STAGE)
    assert status is not None
    assert (status.state, status.restarts) == ("done", 1)


def test_a_waiter_takes_over_from_a_killed_owner(start: Start, tmp_path: Path) -> None:
    victim = start()
    wait_for(steps_of(tmp_path), lines=2)
    waiter = start()
    wait_for_waiter(waiter)
    victim.kill()
    (tmp_path / "go").touch()
    assert waiter.wait(60) == 0
    assert tries(tmp_path) == 2


def test_ctrl_c_is_noted_as_interrupted(start: Start, tmp_path: Path) -> None:
    process = start()
    wait_for(steps_of(tmp_path), lines=2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    status = Store(tmp_path).status(STAGE)
    assert status is not None
    assert (status.state, status.reason) == ("failed", "interrupted")
    (tmp_path / "go").touch()
    assert start().wait(60) == 0


def test_the_heartbeat_keeps_the_seconds_of_a_killed_try(start: Start, tmp_path: Path) -> None:
    process = start()
    wait_for(steps_of(tmp_path), lines=2)
    status_file = steps_of(tmp_path).with_name("status.json")
    deadline = time.monotonic() + 60
    while json.loads(status_file.read_text())["usage"]["wall_seconds"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()


def test_a_real_full_disk_fails_the_stage_and_nothing_else(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        code = (
            "import sys; from pathlib import Path\n"
            "from moesaic.runs.engine import Store; from moesaic.runs.stage import Stage\n"
            "def fill(folder, parents): (folder / 'big').write_bytes(b'x' * 2**20)\n"
            "Store(Path(sys.argv[1])).ensure(Stage(name='big', label='disk', config={}, compute=fill))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(mount)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "failed (disk_full)" in done.stderr
        assert not [path for path in (mount / "big").iterdir() if not path.name.endswith(".partial")]
    finally:
        subprocess.run(["umount", str(mount)], check=True)
