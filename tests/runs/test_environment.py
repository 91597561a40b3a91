"""The environment names what a number depends on, without loading torch for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.runs import environment


def test_it_is_complete_and_plain() -> None:
    found = json.loads(json.dumps(environment.describe_environment()))
    for key in (
        "python_version",
        "torch_version",
        "transformers_version",
        "cpu_model",
        "memory_bytes",
        "code_revision",
    ):
        assert found[key], key
    assert found["device"] == "cpu"


def test_importing_runs_does_not_import_torch() -> None:
    code = (
        "import moesaic.runs.engine, moesaic.runs.record, moesaic.runs.environment as e, sys\n"
        "assert e.describe_environment()['threads'] is None; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_copy_inside_somebody_elses_repository_is_known_by_its_version(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    copy = tmp_path / "environment.py"
    copy.write_text(Path(environment.__file__).read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import environment; print(environment.code_revision())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("v")


def test_without_git_the_version_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.code_revision.__wrapped__().startswith("v")
