import sysconfig
from pathlib import Path
from typing import Literal, get_args

import pytest

from moesaic.data import stdlib
from moesaic.data.corpus import DataError, Split
from moesaic.data.stdlib import Stdlib, is_heldout


def names(corpus: Stdlib, split: Split) -> list[str]:
    return [document.id for document in corpus.documents(split)]


def test_modules_are_split_without_overlap_by_a_hash_of_their_names() -> None:
    train, heldout = names(Stdlib(), "train"), names(Stdlib(), "heldout")
    assert not set(train) & set(heldout)
    assert {"argparse", "heapq", "email.message", "json.decoder"} <= set(train)
    # Written down once: another machine, path or Python version must give the same sides.
    assert {"json", "dataclasses", "email.errors", "queue"} <= set(heldout)
    assert 0.05 < len(heldout) / (len(train) + len(heldout)) < 0.2
    assert train == names(Stdlib(), "train")
    assert train != sorted(train)


def test_what_is_no_library_source_is_left_out() -> None:
    everything = names(Stdlib(), "train") + names(Stdlib(), "heldout")
    assert not [name for name in everything if "site-packages" in name or "_sysconfigdata" in name]
    assert not [name for name in everything if {"tests", "test", "encodings", "pydoc_data"} & set(name.split("."))]


def test_text_is_the_source() -> None:
    (document,) = [document for document in Stdlib().documents("train") if document.id == "heapq"]
    assert document.text == (Path(sysconfig.get_paths()["stdlib"]) / "heapq.py").read_text(encoding="utf-8")


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for number in range(20):
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    return tmp_path


def test_folders_packages_and_encodings(small_library: Path) -> None:
    for folder in ("package", "package/tests", "site-packages", "encodings"):
        (small_library / folder).mkdir()
        (small_library / folder / "__init__.py").write_text(f"'{folder}'")
    (small_library / "latin.py").write_bytes("# coding: latin-1\n'é'".encode("latin-1"))
    (small_library / "broken.py").write_bytes(b"\xff\xff")
    found = {d.id: d.text for corpus in [Stdlib()] for split in get_args(Split) for d in corpus.documents(split)}
    assert len(found) == 22
    assert found["package"] == "'package'"
    assert found["latin"].endswith("'é'")
    with_tests = Stdlib(include_tests=True)
    assert "package.tests" in {*names(with_tests, "train"), *names(with_tests, "heldout")}


def test_fingerprint_follows_content_and_not_place(small_library: Path) -> None:
    before = Stdlib().fingerprint()
    assert before == Stdlib().fingerprint()
    assert Stdlib().provenance().keys() == {"name", "fingerprint", "python"}
    (small_library / "module3.py").write_text("x = 4\n")
    assert Stdlib().fingerprint() != before


def test_share_held_out_grows_and_never_gives_back() -> None:
    modules = [f"module{number}" for number in range(2000)]
    small = {name for name in modules if is_heldout(name, 0.1)}
    large = {name for name in modules if is_heldout(name, 0.3)}
    assert small < large
    assert len(large) / 2000 == pytest.approx(0.3, abs=0.05)


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: Literal["dev"] = "dev"
    with pytest.raises(ValueError, match="split='dev' is not one of train, heldout"):
        list(Stdlib().documents(bad))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"heldout_frac=1\.0 must be between 0 and 1"):
        Stdlib(heldout_frac=1.0)
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=f"no Python source under {tmp_path}.*data=text"):
        list(Stdlib().documents("train"))
    (tmp_path / "json.py").write_text("x = 1")
    with pytest.raises(DataError, match="the train split is empty"):
        list(Stdlib().documents("train"))
