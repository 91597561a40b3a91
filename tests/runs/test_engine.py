"""The store in one process: what is computed, what is kept, what is noted when it goes wrong."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moesaic.runs.attempt import partial_folder
from moesaic.runs.engine import StageFailedError, Store
from moesaic.runs.stage import Stage
from moesaic.runs.status import Status


@dataclass
class Counted:
    """A computation that remembers how often it ran and can be told to fail."""

    text: str = "output"
    error: BaseException | None = None
    calls: list[tuple[Path, tuple[Path, ...]]] = field(default_factory=list)

    def __call__(self, folder: Path, parents: tuple[Path, ...]) -> None:
        self.calls.append((folder, parents))
        (folder / "out.txt").write_text(self.text)
        if self.error is not None:
            raise self.error


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, lines: list[str]) -> Store:
    return Store(tmp_path / "runs", announce=lines.append, poll_s=0.01)


def stage_of(compute: Callable[..., None], *parents: Stage, name: str = "cut", **config: object) -> Stage:
    return Stage(name=name, label="toy", config=config, compute=compute, parents=parents)


def test_a_stage_is_computed_once_and_knows_its_parents(store: Store, tmp_path: Path) -> None:
    dense, cut = Counted("dense"), Counted("cut")
    parent = stage_of(dense, name="backbone")
    child = stage_of(cut, parent, blocks=4)
    folder = store.ensure(child)
    assert folder == tmp_path / "runs" / "cut" / f"toy-{child.identity}"
    assert (folder / "out.txt").read_text() == "cut"
    assert cut.calls == [(partial_folder(folder), (store.folder(parent),))]
    assert store.ensure(child) == folder
    assert Store(store.root).ensure(child) == folder
    assert (len(dense.calls), len(cut.calls)) == (1, 1)
    assert not partial_folder(folder).exists()


def test_a_finished_child_does_not_need_its_parents(store: Store) -> None:
    dense = Counted()
    child = stage_of(Counted(), stage_of(dense, name="backbone"))
    store.ensure(child)
    for path in store.folder(child.parents[0]).iterdir():
        path.unlink()
    store.folder(child.parents[0]).rmdir()
    Store(store.root).ensure(child)
    assert len(dense.calls) == 1


def test_a_shared_parent_is_computed_once(store: Store) -> None:
    dense = Counted()
    parent = stage_of(dense, name="backbone")
    top = stage_of(Counted(), stage_of(Counted(), parent, k=1), stage_of(Counted(), parent, k=2), name="top")
    store.ensure(top)
    assert len(dense.calls) == 1
    assert [state.title.split("/")[0] for state in store.explain(top)] == ["backbone", "cut", "cut", "top"]


def test_what_decided_the_output_lies_beside_it(store: Store) -> None:
    stage = stage_of(Counted(), stage_of(Counted(), name="backbone"), blocks=4)
    folder = store.ensure(stage)
    frozen = json.loads((folder / "config.json").read_text())
    assert frozen["config"] == {"blocks": 4}
    assert frozen["identity"] == stage.identity
    assert frozen["parents"] == [stage.parents[0].title]
    status = Status.read(folder)
    assert status is not None
    assert (status.state, status.pid, status.restarts) == ("done", os.getpid(), 0)
    assert status.usage.wall_seconds > 0
    assert status.usage.peak_rss_bytes > 2**20
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"config.json", "out.txt"}


def test_the_config_is_frozen_when_the_stage_starts(store: Store) -> None:
    config = {"blocks": 4}

    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        config["blocks"] = 8

    stage = Stage(name="cut", label="toy", config=config, compute=compute)
    folder = store.ensure(stage)
    assert folder.name.endswith(stage.identity)
    assert json.loads((folder / "config.json").read_text())["config"] == {"blocks": 4}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FloatingPointError("loss is nan"), "diverged"),
        (MemoryError("no room"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (ZeroDivisionError("division by zero"), "error"),
        (ValueError("no corpus"), "error"),
    ],
)
def test_a_failure_is_noted_and_keeps_what_was_done(store: Store, error: Exception, reason: str) -> None:
    compute = Counted(error=error)
    stage = stage_of(compute)
    with pytest.raises(StageFailedError, match=rf"{stage.title} failed \({reason}\): ") as caught:
        store.ensure(stage)
    assert caught.value.__cause__ is error
    assert not store.folder(stage).exists()
    partial = partial_folder(store.folder(stage))
    assert (partial / "out.txt").exists()
    status = store.status(stage)
    assert status is not None
    assert (status.state, status.reason) == ("failed", reason)
    assert caught.value.traceback_path == partial / "traceback.txt"
    assert type(error).__name__ in (partial / "traceback.txt").read_text()
    assert [state.state for state in store.explain(stage)] == ["failed"]

    compute.error = None
    folder = store.ensure(stage)
    status = Status.read(folder)
    assert status is not None
    assert (status.state, status.restarts, status.reason) == ("done", 1, None)
    assert not (folder / "traceback.txt").exists()


def test_the_cause_of_a_wrapped_error_decides_the_reason(store: Store) -> None:
    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save") from error

    with pytest.raises(StageFailedError, match="disk_full"):
        store.ensure(stage_of(compute))


def test_a_retry_finds_the_files_of_the_first_try_and_its_seconds_count(store: Store) -> None:
    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        if not (folder / "checkpoint").exists():
            (folder / "checkpoint").write_text("half")
            (folder / ".other.1234.writing").write_text("left by a kill")
            raise MemoryError
        assert not (folder / ".other.1234.writing").exists()

    stage = stage_of(compute)
    with pytest.raises(StageFailedError):
        store.ensure(stage)
    partial = partial_folder(store.folder(stage))
    text = (partial / "status.json").read_text()
    spent = json.loads(text)
    spent["usage"]["wall_seconds"] = 100.0
    (partial / "status.json").write_text(json.dumps(spent))
    status = Status.read(store.ensure(stage))
    assert status is not None
    assert status.usage.wall_seconds > 100.0
    assert status.started_utc == spent["started_utc"]


def test_ctrl_c_is_noted_and_goes_on_as_it_came(store: Store) -> None:
    stage = stage_of(Counted(error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store.ensure(stage)
    status = store.status(stage)
    assert status is not None
    assert (status.state, status.reason) == ("failed", "interrupted")


def test_a_failing_parent_stops_the_child_before_it_starts(store: Store) -> None:
    child = Counted()
    parent = stage_of(Counted(error=ValueError("bad")), name="backbone")
    with pytest.raises(StageFailedError, match="backbone/toy"):
        store.ensure(stage_of(child, parent))
    assert child.calls == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "out.txt").write_text("outpuT"), "the content of out.txt has changed"),
        (lambda f: (f / "out.txt").write_text("out"), "out.txt has 3 bytes instead of 6"),
        (lambda f: (f / "out.txt").unlink(), "out.txt is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
        (lambda f: (f / "status.json").write_bytes(b"\xff\xfe"), "no status of a finished stage"),
        (lambda f: (f / "status.json").unlink(), "no status of a finished stage"),
    ],
)
def test_a_damaged_entry_is_set_aside_and_computed_again(
    store: Store, lines: list[str], damage: Callable[[Path], object], words: str
) -> None:
    compute = Counted()
    stage = stage_of(compute)
    folder = store.ensure(stage)
    damage(folder)
    again = Store(store.root, announce=lines.append)
    assert again.ensure(stage) == folder
    assert (folder / "out.txt").read_text() == "output"
    assert len(compute.calls) == 2
    assert folder.with_name(f"{folder.name}.corrupt-1").is_dir()
    assert any("warning" in line and words in line for line in lines)


def test_a_second_damage_gets_its_own_place(store: Store) -> None:
    stage = stage_of(Counted())
    for _ in range(2):
        folder = Store(store.root, announce=lambda line: None).ensure(stage)
        (folder / "out.txt").unlink()
    folder = Store(store.root, announce=lambda line: None).ensure(stage)
    assert sorted(p.name for p in folder.parent.glob("*corrupt*")) == [f"{folder.name}.corrupt-{n}" for n in (1, 2)]


def test_a_large_file_is_hashed_again_only_when_its_time_has_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.runs.manifest.ALWAYS_HASHED_BYTES", 3)
    compute = Counted()
    stage = stage_of(compute)
    out = store.ensure(stage) / "out.txt"
    out.write_text("outpuT")
    os.utime(out, ns=(0, 0))
    Store(store.root, announce=lambda line: None).ensure(stage)
    assert len(compute.calls) == 2


def test_a_full_disk_while_publishing_leaves_nothing_that_looks_finished(
    store: Store, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    stage = stage_of(Counted())

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.runs.manifest.write_json_atomic", full)
        patch.setattr("moesaic.runs.status.write_json_atomic", full)
        patch.setattr("moesaic.runs.attempt.write_text_atomic", full)
        with pytest.raises(StageFailedError, match="disk_full") as caught:
            store.ensure(stage)
    assert caught.value.traceback_path is None
    assert not store.folder(stage).exists()
    assert any("could not be noted" in line for line in lines)
    assert (store.ensure(stage) / "out.txt").exists()


def test_a_full_disk_for_the_lock_is_a_failed_stage_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moesaic.runs.lease.write_json_atomic", full)
    with pytest.raises(StageFailedError, match="disk_full"):
        store.ensure(stage_of(Counted()))


def test_threads_that_need_one_stage_compute_it_once(store: Store, lines: list[str]) -> None:
    entered, go_on = threading.Event(), threading.Event()
    calls: list[Path] = []

    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        calls.append(folder)
        entered.set()
        assert go_on.wait(20)

    stage = stage_of(compute)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(store.ensure(stage))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(20)
    assert [state.state for state in store.explain(stage)] == ["running"]
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1
    assert folders == [store.folder(stage)] * 4


def test_what_the_stages_cost_says_which_were_there_before(store: Store) -> None:
    parent = stage_of(Counted(), name="backbone")
    Store(store.root, announce=lambda line: None).ensure(parent)
    child = stage_of(Counted(), parent)
    store.ensure(child)
    uses = store.uses(child)
    assert [(use.stage, use.identity, use.cached) for use in uses] == [
        ("backbone", parent.identity, True),
        ("cut", child.identity, False),
    ]
    assert all(use.wall_seconds > 0 for use in uses)


def test_explaining_computes_nothing(store: Store) -> None:
    compute = Counted()
    stage = stage_of(compute)
    assert [(s.title, s.state, s.note) for s in store.explain(stage)] == [(stage.title, "missing", "")]
    assert compute.calls == []
    assert not store.root.exists()
    store.ensure(stage)
    assert [s.state for s in store.explain(stage)] == ["done"]
