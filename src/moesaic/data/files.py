"""Corpora from local files: JSON lines and plain text, each also gzipped."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from moesaic.data.corpus import Corpus, DataError, Document, Split, digest_of

__all__ = ["Jsonl", "TextFiles", "digest_of_file", "json_rows", "value_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Jsonl(Corpus):
    """One JSON object per line, the text under `text_key`; blank lines are passed over."""

    train: Path  # .jsonl or .jsonl.gz
    heldout: Path
    text_key: str = "text"
    id_key: str | None = None  # null: the line number names the document

    def read(self, split: Split) -> Iterator[Document]:
        path = _path_of(self, split)
        for number, row in json_rows(path):
            name = str(number) if self.id_key is None else str(value_of(row, self.id_key, path, number))
            yield Document(name, self._text(row, path, number), self.label_of(row, path, number))

    def label_of(self, row: dict[str, Any], path: Path, number: int) -> int | None:
        """What class the row is an example of; plain text is of none."""
        return None

    def _text(self, row: dict[str, Any], path: Path, number: int) -> str:
        text = value_of(row, self.text_key, path, number)
        if not isinstance(text, str):
            raise DataError(
                f"{path}:{number}: '{self.text_key}' is {type(text).__name__}, not text. Set data.text_key."
            )
        return text

    def describe(self, split: Split) -> str:
        return str(_path_of(self, split))

    def fingerprint(self) -> str:
        return digest_of(digest_of_file(path) for path in (self.train, self.heldout))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles(Corpus):
    """Plain UTF-8 text: a file, or a folder of which every *.txt and *.txt.gz is read in order of name.

    With a `separator` a file holds several documents, stripped of the white space around them; without, just one.
    """

    train: Path
    heldout: Path
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator='' splits nowhere; null makes each file one document")

    def read(self, split: Split) -> Iterator[Document]:
        for path in _text_files(_path_of(self, split)):
            with _opened(path) as file:
                if self.separator is None:
                    yield Document(path.name, file.read())
                    continue
                for number, text in enumerate(_pieces(file, self.separator), start=1):
                    yield Document(f"{path.name}#{number}", text.strip())

    def describe(self, split: Split) -> str:
        return str(_path_of(self, split))

    def fingerprint(self) -> str:
        roots = (self.train, self.heldout)
        return digest_of(digest_of_file(path) + path.name.encode() for root in roots for path in _text_files(root))


def _path_of(corpus: Jsonl | TextFiles, split: Split) -> Path:
    return corpus.train if split == "train" else corpus.heldout


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}). Copy it again, or drop .gz from its name."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1) if path.parent.is_dir() else []
    hint = f" Did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""
    return DataError(
        f"cannot read {path}: {error.strerror}.{hint} Set data.train and data.heldout to readable files "
        f"(relative paths count from {Path.cwd()})."
    )


def _text_files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]
    return sorted([*root.rglob("*.txt"), *root.rglob("*.txt.gz")])


def _pieces(file: TextIO, separator: str) -> Iterator[str]:
    rest = ""
    while chunk := file.read(2**20):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz with their line numbers, from 1. Raises DataError for anything else."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(line, path, number)


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}:{number}: {type(row).__name__} instead of an object. Each line must be one JSON object."
        )
    return row


def value_of(row: dict[str, Any], key: str, path: Path, number: int) -> Any:
    """`row[key]`, of line `number` of `path`. Raises DataError that names the nearest key."""
    if key in row:
        return row[key]
    near = get_close_matches(key, row, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise DataError(
        f"{path}:{number}: no key '{key}'{hint} Keys here: {', '.join(row)}. "
        "Set data.text_key, data.id_key or data.label_key."
    )


def digest_of_file(path: Path) -> bytes:
    """sha256 of a file's content. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error) from error
