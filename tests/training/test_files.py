from pathlib import Path

import pytest

from moesaic.training.files import replace_whole


def test_failure_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replace_whole(path) as file:
        file.write(b"first")
    with pytest.raises(TypeError), replace_whole(path) as file:
        file.writelines([b"second, half", None])
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_target_appears_only_when_whole(tmp_path: Path) -> None:
    with replace_whole(tmp_path / "file") as file:
        file.write(b"x")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"x"
