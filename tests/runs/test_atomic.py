"""Atomic writes: whole or absent, whatever happens in between."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moesaic.runs.atomic import open_atomic, remove_temporaries, write_json_atomic, write_text_atomic


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"b": 1, "a": [1.5, None]})
    write_json_atomic(path, {"a": "ü"})
    assert json.loads(path.read_text()) == {"a": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def write_half() -> None:
        with open_atomic(path) as file:
            file.write(b"half of the ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_at_the_last_moment_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_not_a_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in (".a.json.12345678.writing", "sub/.b.0.writing", ".hidden", "kept.writing"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".hidden", "kept.writing"]
