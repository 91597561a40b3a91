import json
from pathlib import Path

import pytest

from moesaic.data.corpus import DataError
from moesaic.data.hub import Hub, grouped


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for split, texts in {"train": ["a", "", "b"], "validation": ["c"]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return tmp_path


def hub(dataset: Path | str, **options: str) -> Hub:
    return Hub(name="toy", dataset=str(dataset), revision="0", **options)


def test_rows_are_documents(dataset: Path) -> None:
    assert [(d.id, d.text) for d in hub(dataset).documents("train")] == [("1", "a"), ("3", "b")]
    assert [d.text for d in hub(dataset).documents("heldout")] == ["c"]


def test_rows_are_put_together_to_documents() -> None:
    rows = ["\n", " = Title = \n", "text\n", " = = Section = = \n", "more\n", " = Next = \n", "end\n"]
    assert list(grouped(iter(rows), " = [^=]")) == [
        "\n",
        " = Title = \ntext\n = = Section = = \nmore\n",
        " = Next = \nend\n",
    ]


def test_fingerprint_is_the_revision_of_what_is_read() -> None:
    one = hub("owner/name")
    assert one.fingerprint() == hub("owner/name").fingerprint()
    others = [hub("owner/name", heldout="test"), Hub(name="toy", dataset="owner/name", revision="1")]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 3


def test_messages(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load owner/name, .*Is the hub reachable from here\? Local files"):
        next(hub("owner/name").documents("train"))
    with pytest.raises(DataError, match=r"split dev: Bad split: dev\. Available splits: \['train', 'validation'\]"):
        next(hub(dataset, train="dev").documents("train"))
    with pytest.raises(DataError, match="no column 'body'; columns: text"):
        next(hub(dataset, text_key="body").documents("train"))
    with pytest.raises(ValueError, match="no regular expression"):
        hub(dataset, document_start="(")
