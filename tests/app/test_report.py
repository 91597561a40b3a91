"""moesaic-report as a user runs it: exit codes, messages, files."""

import subprocess
import sys
from pathlib import Path

import pytest
from report.synthetic_records import write_runs

from moesaic.app.report import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"), seeds=(0,))


def test_done(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(runs), "--out", str(tmp_path / "out"), "--quality", "next_line.acc", "--reference", "2", "1.5"]) == 0
    )
    printed = capsys.readouterr().out
    assert "moefication" in printed
    for name in ("report.html", "pareto.png", "gaps.png", "share.png", "table.parquet", "table.csv", "pays.csv"):
        assert (tmp_path / "out" / name).is_file()
        assert str(tmp_path / "out" / name) in printed


def test_the_default_place_is_inside_the_runs_and_can_be_repeated(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, seeds=(0,))
    assert [main([str(runs)]), main([str(runs)])] == [0, 0]
    assert (runs / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "is not a folder"),
        (["{tmp}"], "no record.json under"),
        (["{runs}", "--quality", "perplexty"], "did you mean 'perplexity'?"),
        (["{runs}", "--reference", "0", "1"], "both must be above 0"),
    ],
)
def test_refused(
    arguments: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(tmp=tmp_path, runs=runs) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_a_failure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(runs), "--out", str(tmp_path / "file" / "out")]) == 1
    assert f"cannot write to {tmp_path / 'file' / 'out'}" in capsys.readouterr().err


def test_exit_codes_and_imports_of_the_real_command(runs: Path) -> None:
    command = [sys.executable, "-m", "moesaic.app.report"]
    assert subprocess.run([*command, str(runs / "nowhere")], capture_output=True, check=False).returncode == 2
    code = (
        "import sys; from moesaic.app.report import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'pandas', 'plotly', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"main([{str(runs)!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
