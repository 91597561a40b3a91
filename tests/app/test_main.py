"""The command line, as a user meets it: exit codes, one readable message, nothing left lying about."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.app.compose import compose_plain
from moesaic.app.groups import conf_folder, config_folders, config_groups

STUB = Path(__file__).with_name("stub.py")
CONF = STUB.with_name("conf")

Moesaic = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def moesaic(tmp_path: Path) -> Moesaic:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(STUB), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_help_lists_every_group_and_option_without_loading_hydra() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(STUB.parent)!r})\n"
        "from moesaic.app.main import main; sys.argv = ['moesaic', '--help']\n"
        "try: main()\n"
        "finally: print({'hydra', 'omegaconf', 'torch', 'filelock'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    for group, options in config_groups([conf_folder()]).items():
        assert f"\n{group}\n" in done.stdout
        for option in options:
            assert re.search(rf"^  {re.escape(option)}\b", done.stdout, re.MULTILINE)
    assert "Examples:" in done.stdout


def test_help_of_the_installed_command_shows_the_users_own_options(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# @package _global_\n# My own method.\nname: mine\n")
    command = [str(Path(sys.executable).with_name("moesaic")), "--help", f"--config-dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.search(r"^  mine +My own method\.$", done.stdout, re.MULTILINE)


def test_version(moesaic: Moesaic) -> None:
    assert re.fullmatch(r"moesaic \d+\.\d+.*\n", moesaic("--version").stdout)


def test_a_run_says_where_its_record_is_and_a_second_one_has_no_work(moesaic: Moesaic, tmp_path: Path) -> None:
    first = moesaic()
    assert (first.returncode, "computing adapt/stub-" in first.stderr) == (0, True)
    record = first.stdout.removeprefix("record: ").strip()
    assert (tmp_path / record / "status.json").exists()
    second = moesaic()
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "computing" not in second.stderr


def test_nothing_lies_about_but_the_runs(moesaic: Moesaic, tmp_path: Path) -> None:
    moesaic()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".locks", "adapt"]
    assert moesaic("-m", "seed=1,2").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".hydra", ".locks", "adapt"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_unknown_key_is_refused_with_or_without_a_plus(moesaic: Moesaic, tmp_path: Path, prefix: str) -> None:
    done = moesaic(f"{prefix}method.outcom=done")
    assert done.returncode == 2
    expected = "unknown key method.outcom; did you mean 'outcome'? Keys of MethodConfig: outcome, part, strength."
    assert done.stderr == f"moesaic: refused: {expected}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=fnie"], r"method=fnie is no option of method; did you mean 'fine'\? Options: buggy, .*waiting\.$"),
        (["metod=fine"], r"unknown key metod; did you mean 'method'\?"),
        (["method/part=smal"], r"method/part=smal is no option of method/part; did you mean 'small'\?"),
        (["methd/part=small"], r"Could not override 'methd/part'.*did you mean 'method/part'\?$"),
        (["hydra.joob.name=x"], r"Could not override 'hydra\.joob\.name'.*did you mean 'job'\?$"),
        (["seed=x"], r"seed='x' is text, but an integer is wanted"),
        (["seed=1,2"], r"Ambiguous value for argument 'seed=1,2'.*--multirun"),
        (["method.part.size=9"], r"method\.part\.size=9 exceeds 8 \(allowed: 1\.\.8\)\. Lower it\."),
        (["method.strength=nan"], r"method\.strength=nan is not a finite number"),
        (["method=unset"], r"method\.outcome is required by MethodConfig"),
        (["method=late"], r"data\.train=nowhere\.jsonl does not exist$"),
        (["method=dangling"], r"method\.outcome: Interpolation key 'no\.such\.key' not found$"),
        (["method.part=[1"], r"cannot read 'method\.part=\[1'"),
        (["=3"], r"Config group override must be a string"),
        (["~method.outcome"], r"method\.outcome is required"),
        (["--config-dir", "no_such_folder", "seed=1"], r"no_such_folder"),
        (["-m", "method=fine,fnie"], r"method=fnie is no option of method; did you mean 'fine'"),
        (["-m", "method.outcom=a,b"], r"unknown key method\.outcom"),
        (["method.outcom=done", "seeed=1"], r"unknown key (seeed|method\.outcom)"),
    ],
)
def test_a_wrong_command_is_refused_in_one_message(moesaic: Moesaic, arguments: list[str], message: str) -> None:
    done = moesaic(*arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(f"moesaic: refused: .*{message}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_an_unknown_flag_is_refused(moesaic: Moesaic) -> None:
    assert moesaic("--mutlirun", "seed=1").returncode == 2


def test_a_broken_yaml_of_the_user_is_refused(moesaic: Moesaic, tmp_path: Path) -> None:
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "broken.yaml").write_text("outcome: [done\n")
    done = moesaic("--config-dir", "mine", "method=broken")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "broken.yaml" in done.stderr


def test_a_default_that_no_yaml_mentions_can_be_set(moesaic: Moesaic) -> None:
    done = moesaic("method.strength=2", "dry_run=true")
    assert done.returncode == 0
    assert done.stdout != moesaic("dry_run=true").stdout


def test_options_of_the_users_own(moesaic: Moesaic, tmp_path: Path) -> None:
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "own.yaml").write_text("outcome: done\nstrength: 3\n")
    done = moesaic("--config-dir", "mine", "method=own", "method.strength=4")
    assert done.returncode == 0
    frozen = tmp_path / done.stdout.removeprefix("record: ").strip() / "config.json"
    assert '"strength": 4.0' in frozen.read_text()


def test_a_failed_stage_exits_1_and_names_its_traceback(moesaic: Moesaic, tmp_path: Path) -> None:
    done = moesaic("method=diverging", "seed=7")
    assert done.returncode == 1
    assert re.search(r"moesaic: adapt/stub-\w+ failed \(diverged\): loss is nan at step 7\n  traceback: ", done.stderr)
    assert "Traceback" not in done.stderr
    path = done.stderr.rpartition("traceback: ")[2].strip()
    assert "FloatingPointError" in (tmp_path / path).read_text()


def test_a_bug_exits_1_and_its_traceback_is_kept(moesaic: Moesaic, tmp_path: Path) -> None:
    done = moesaic("method=buggy")
    assert done.returncode == 1
    assert "moesaic: unexpected KeyError: 'a name that is not there'" in done.stderr
    assert "Traceback (most recent" not in done.stderr
    assert "raise KeyError" in Path(done.stderr.rpartition("traceback: ")[2].strip()).read_text()


def test_a_grid_goes_on_after_a_failure_and_says_so_at_once(moesaic: Moesaic) -> None:
    done = moesaic("-m", "method=diverging", "seed=1,2,3")
    assert done.returncode == 1
    events = re.findall(r"job \d|loss is nan at step \d|going on|\d of \d jobs done", done.stderr)
    one, three = (["loss is nan at step 1", "going on"], ["loss is nan at step 3", "going on"])
    assert events == ["job 0", *one, "job 1", "job 2", *three, "1 of 3 jobs done"]
    assert re.search(r"^  failed   method=diverging seed=3$", done.stderr, re.MULTILINE)


def test_a_grid_stops_at_the_first_failure_when_told_to(moesaic: Moesaic) -> None:
    done = moesaic("-m", "method=diverging", "seed=1,2,3", "keep_going=false")
    assert done.returncode == 1
    assert "loss is nan at step 1" in done.stderr
    assert "stopped at the first failure" in done.stderr
    assert "job 1" not in done.stderr


def test_a_refused_job_stops_a_grid_too(moesaic: Moesaic) -> None:
    done = moesaic("-m", "method=dangling,fine", "keep_going=false")
    assert (done.returncode, "job 1" in done.stderr) == (2, False)


def test_a_grid_that_is_refused_in_part_still_exits_2(moesaic: Moesaic) -> None:
    done = moesaic("-m", "method.part.size=2,9")
    assert done.returncode == 2
    assert "1 of 2 jobs done" in done.stderr


def test_a_grid_can_be_a_file(moesaic: Moesaic) -> None:
    done = moesaic("experiment=grid")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3


def test_a_dry_run_lists_stages_and_computes_nothing(moesaic: Moesaic, tmp_path: Path) -> None:
    done = moesaic("dry_run=true")
    assert re.fullmatch(
        r"missing +adapt/stub-\w+\ndry run: 0 of 1 stages are done, nothing was computed\n", done.stdout
    )
    assert list(tmp_path.iterdir()) == []
    moesaic()
    assert "done         adapt/stub-" in moesaic("dry_run=true").stdout


def test_ctrl_c_exits_130_and_says_that_a_rerun_continues(tmp_path: Path) -> None:
    command = [sys.executable, str(STUB), "method=waiting"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/adapt/*.partial/started")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues where it stopped" in err
    assert "Traceback" not in err
    assert '"reason": "interrupted"' in next(tmp_path.glob("runs/adapt/*.partial/status.json")).read_text()


def test_the_command_line_overrides_a_grid_in_a_file(moesaic: Moesaic) -> None:
    assert len(moesaic("experiment=grid", "seed=5,6", "dry_run=true").stdout.splitlines()) == 4


def test_groups_of_all_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "one.yaml").write_text("a: 1\n")
    assert config_folders(CONF, ["-cd", "x", "--config-dir=y", "seed=1"]) == [CONF, Path("x"), Path("y")]
    groups = config_groups([CONF, tmp_path])
    assert groups["own"] == {"one": ""}
    assert groups["experiment"] == {"grid": "A grid that is a file."}


def test_composing_without_a_command_line() -> None:
    plain = compose_plain(["method.strength=2", "seed=3"], conf=CONF)
    expected = {"outcome": "done", "part": {"size": 2}, "strength": 2}
    assert plain == {"method": expected, "paths": {"runs": "runs"}, "seed": 3, "dry_run": False, "keep_going": True}
