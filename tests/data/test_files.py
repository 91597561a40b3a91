import gzip
import json
from pathlib import Path

import pytest

from moesaic.data.corpus import Corpus, DataError
from moesaic.data.files import Jsonl, TextFiles


def jsonl(path: Path, **options: str) -> Jsonl:
    return Jsonl(name="toy", train=path, heldout=path, **options)


def text(path: Path, separator: str | None = None) -> TextFiles:
    return TextFiles(name="toy", train=path, heldout=path, separator=separator)


def pairs(corpus: Corpus) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in corpus.documents("train")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_plain_and_gzipped(tmp_path: Path, name: str) -> None:
    rows = [{"title": "One", "text": "ä\nb"}, {"title": "Empty", "text": ""}, {"title": "Two", "text": "c"}]
    content = ("\n\n".join(map(json.dumps, rows)) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert pairs(jsonl(tmp_path / name)) == [("1", "ä\nb"), ("5", "c")]
    assert pairs(jsonl(tmp_path / name, id_key="title")) == [("One", "ä\nb"), ("Two", "c")]


def test_splits_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"text": "a"}')
    (tmp_path / "b").write_text('{"text": "b"}')
    corpus = Jsonl(name="toy", train=tmp_path / "a", heldout=tmp_path / "b")
    assert [d.text for d in corpus.documents("heldout")] == ["b"]
    swapped = Jsonl(name="toy", train=tmp_path / "b", heldout=tmp_path / "a")
    assert corpus.fingerprint() != swapped.fingerprint()
    (tmp_path / "c").write_text('{"text": "a"}')
    assert Jsonl(name="toy", train=tmp_path / "c", heldout=tmp_path / "b").fingerprint() == corpus.fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": }\n', r"a\.jsonl:2: not JSON .*one JSON object"),
        (b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2: list instead of an object"),
        (b'{"txt": "a"}\n', r"a\.jsonl:1: no key 'text'; did you mean 'txt'\? Keys here: txt\. Set data\.text_key"),
        (b'{"text": 3}\n', r"a\.jsonl:1: 'text' is int, not text"),
        (b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 text .* at byte 10"),
        (b"", r"the train split is empty\. Looked at: .*a\.jsonl"),
        (b'{"text": ""}\n', "the train split is empty"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        pairs(jsonl(tmp_path / "a.jsonl"))


def test_unreadable_paths_say_so(tmp_path: Path) -> None:
    (tmp_path / "novels.jsonl").write_text('{"text": "a"}')
    with pytest.raises(
        DataError, match=r"cannot read .*novel\.jsonl: No such file.*Did you mean .*novels\.jsonl\?.*Set"
    ):
        pairs(jsonl(tmp_path / "novel.jsonl"))
    with pytest.raises(DataError, match=r"cannot read .*/nowhere/x: No such file or directory\. Set data\.train"):
        jsonl(tmp_path / "nowhere" / "x").fingerprint()
    with pytest.raises(DataError, match="Is a directory"):
        pairs(jsonl(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "not gzip"])
def test_damaged_gzip_says_so(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-20] if damage == "truncated" else b"plain text")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        pairs(jsonl(tmp_path / "a.jsonl.gz"))


def test_text_with_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\ntwo\n lines\n<|endoftext|>\n")
    assert pairs(text(tmp_path / "a.txt", "<|endoftext|>")) == [("a.txt#1", "one"), ("a.txt#2", "two\n lines")]
    assert pairs(text(tmp_path / "a.txt")) == [("a.txt", (tmp_path / "a.txt").read_text())]


def test_separator_across_the_border_of_two_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (2**20 - 2) + "<|>" + "y")
    assert [len(body) for _, body in pairs(text(tmp_path / "a.txt", "<|>"))] == [2**20 - 2, 1]


def test_folder_of_text_is_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "note.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    assert pairs(text(tmp_path)) == [("a.txt", "a.txt"), ("b.txt", "b.txt"), ("c.txt.gz", "c")]
    before = text(tmp_path).fingerprint()
    (tmp_path / "b.txt").write_text("changed")
    assert text(tmp_path).fingerprint() != before


def test_folder_without_text_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the train split is empty. Looked at: {tmp_path}"):
        pairs(text(tmp_path))
    with pytest.raises(ValueError, match="null makes each file one document"):
        text(tmp_path, "")
