"""Broken days, as a user meets them at the command line: nothing is lost, and nothing looks finished that is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOESAIC = str(Path(sys.executable).parent / "moesaic")
LONG = ["method=dense_same_tokens", "adapt.fit.steps=600", "adapt.fit.checkpoint_every_steps=20", "bench=none"]


def start(overrides: list[str], **changes: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen([MOESAIC, *overrides], env=environment, text=True, stdout=-1, stderr=-1)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(runs: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    """The first path below `runs` that matches; fails if the process ends before there is one."""
    while process.poll() is None:
        found = next(runs.rglob(pattern), None)
        if found is not None:
            return found
        time.sleep(0.02)
    raise AssertionError(f"ended before {pattern} appeared: {process.communicate()[1]}")


def adapted(runs: Path) -> Path:
    return next(path for path in (runs / "adapt").iterdir() if not path.name.endswith(".partial"))


def states(runs: Path) -> dict[str, str]:
    """State of every stage by folder; a folder without a status has none."""
    return {
        path.parent.name: json.loads(path.read_text())["state"]
        for path in runs.glob("*/*/status.json")
        if path.is_file()
    }


def with_runs(overrides: list[str], runs: Path) -> list[str]:
    return [each for each in overrides if not each.startswith("paths.runs=")] + [f"paths.runs={runs}"]


@pytest.mark.system
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_adaptation_continues_and_ends_at_the_same_weights(how, overrides, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert finish(start([*with_runs(overrides, straight), *LONG]))[0] == 0

    victim = start([*with_runs(overrides, broken), *LONG])
    wait_for(broken, "adapt/*.partial/last.ckpt", victim)
    victim.send_signal(how)
    code, errors = finish(victim)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how], errors
    assert not list((broken / "record").glob("*")) if (broken / "record").exists() else True
    assert not [path for path in (broken / "adapt").iterdir() if not path.name.endswith(".partial")]

    code, errors = finish(start([*with_runs(overrides, broken), *LONG]))
    assert code == 0, errors
    one, other = ((adapted(runs) / "model.safetensors").read_bytes() for runs in (straight, broken))
    assert one == other
    steps = [json.loads(line)["step"] for line in (adapted(broken) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    status = json.loads((adapted(broken) / "status.json").read_text())
    assert status["restarts"] >= 1


@pytest.mark.system
def test_two_runs_of_one_config_compute_each_stage_once(overrides, tmp_path):
    both = [start([*overrides, *LONG]) for _ in range(2)]
    results = [finish(process) for process in both]
    assert [code for code, _ in results] == [0, 0], results
    computed = [line for _, errors in results for line in errors.splitlines() if line.startswith("computing")]
    assert len(computed) == len(set(computed))
    assert len(list((tmp_path / "runs" / "record").glob("*/record.json"))) == 1
    assert set(states(tmp_path / "runs").values()) == {"done"}


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_finished(overrides, tmp_path):
    runs = tmp_path / "small"
    runs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(runs)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        code, errors = finish(start([*with_runs(overrides, runs), "method=dense_same_tokens"]))
        assert code == 1
        assert "disk_full" in errors or "No space left" in errors
        assert not list(runs.glob("record/*/record.json"))
        for name, state in states(runs).items():
            assert state == "done" or name.endswith(".partial")
    finally:
        subprocess.run(["umount", str(runs)], check=True)


def test_a_loss_that_is_not_a_number_ends_the_point_with_its_reason(overrides, tmp_path):
    wild = ["method=dense_same_tokens", "adapt.fit.lr=1e30", "adapt.fit.steps=20", "adapt.fit.clip_norm=null"]
    code, errors = finish(start([*overrides, *wild]))
    assert code == 1
    assert "diverged" in errors
    record = json.loads(next((tmp_path / "runs/record").glob("*/record.json")).read_text())
    assert record["state"] == "failed"
    assert [point["failure"]["reason"] for point in record["points"]] == ["diverged"]
    assert states(tmp_path / "runs")
    assert not [path for path in (tmp_path / "runs/adapt").iterdir() if not path.name.endswith(".partial")]


def test_a_corrupt_cache_entry_is_set_aside_and_computed_again(overrides, tmp_path):
    command = [*overrides, "method=static_slice", "method.budgets=[2]"]
    assert finish(start(command))[0] == 0
    runs = tmp_path / "runs"
    model = next(runs.glob("convert/*/model.safetensors"))
    good = model.read_bytes()
    model.write_bytes(good[:-10] + b"0123456789")
    for stage in ("adapt", "evaluate"):
        shutil.rmtree(runs / stage)
    code, errors = finish(start(command))
    assert code == 0, errors
    assert "damaged" in errors
    assert model.read_bytes() == good
    assert list(runs.glob("convert/*.corrupt-1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.select.kk=2"], "did you mean 'k'"),
        (["+method.select.kk=2"], "did you mean 'k'"),
        (["method=moefication", "method.select.k=33"], "exceeds"),
        (["method=moefication", "method.partition.num_blocks=24", "method.budgets=[6]"], "does not divide"),
        (["method=factorlm"], "did you mean 'factorllm'"),
        (["data.train=/nowhere.txt"], "cannot read /nowhere.txt"),
        (["data.heldout=EMPTY"], "the heldout split is empty"),
        (["backbone.path=CORRUPT"], "model.safetensors"),
        (["backbone.path=UNKNOWN"], "FFN"),
    ],
)
def test_bad_input_is_refused_in_one_readable_message(changes, message, overrides, inputs, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    corrupt = tmp_path / "corrupt"
    shutil.copytree(inputs / "model", corrupt)
    (corrupt / "model.safetensors").write_bytes(b"not a model")
    unknown = tmp_path / "unknown"
    shutil.copytree(inputs / "model", unknown)
    mamba = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    (unknown / "config.json").write_text(json.dumps(mamba))
    places = {"EMPTY": tmp_path / "empty.txt", "CORRUPT": corrupt, "UNKNOWN": unknown}
    changes = [
        each.replace(name, str(path)) for each in changes for name, path in places.items() if name in each
    ] or changes
    code, errors = finish(start(["method=factorllm", *overrides, *changes]))
    assert code in (1, 2), errors
    assert message in errors
    assert "Traceback" not in errors
    runs = tmp_path / "runs"
    assert not list(runs.glob("record/*/record.json"))
