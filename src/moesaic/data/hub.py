"""Corpora from the Hugging Face hub, or from a local folder in one of its layouts, streamed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moesaic.data.corpus import Corpus, DataError, Document, Split, digest_of

__all__ = ["Hub"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hub(Corpus):
    """Rows of a data set, each one document unless `document_start` is given."""

    dataset: str  # "owner/name", or a local folder
    config: str | None = None
    revision: str  # commit: a branch can move, and the fingerprint stands for it alone
    train: str = "train"  # name of the split there
    heldout: str = "validation"
    text_key: str = "text"
    # Regular expression; a row in which it matches begins a new document, other rows are appended to it unchanged.
    document_start: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise ValueError(f"document_start={self.document_start!r} is no regular expression: {error}") from error

    def read(self, split: Split) -> Iterator[Document]:
        rows = self._texts(split)
        documents = rows if self.document_start is None else grouped(rows, self.document_start)
        for number, text in enumerate(documents, start=1):
            yield Document(str(number), text)

    def describe(self, split: Split) -> str:
        there = self.train if split == "train" else self.heldout
        return f"{self.dataset}, config {self.config}, revision {self.revision}, split {there}"

    def fingerprint(self) -> str:
        parts = (self.dataset, self.config or "", self.revision, self.train, self.heldout)
        return digest_of(part.encode() for part in parts)

    def _texts(self, split: Split) -> Iterator[str]:
        try:
            for row in self._rows(split):
                if self.text_key not in row:
                    raise DataError(f"{self.dataset}: no column '{self.text_key}'; columns: {', '.join(row)}")
                yield str(row[self.text_key])
        except OSError as error:
            raise DataError(
                f"cannot load {self.describe(split)}: {error}. Is the hub reachable from here? "
                "Local files need none: data=text or data=novels with data.train=... data.heldout=..."
            ) from error

    def _rows(self, split: Split) -> Any:
        from datasets import load_dataset  # takes a second

        try:
            return load_dataset(
                self.dataset,
                self.config,
                split=self.train if split == "train" else self.heldout,
                revision=self.revision,
                streaming=True,
            )
        except ValueError as error:  # an unknown config or split: the message lists those that exist
            raise DataError(f"cannot load {self.describe(split)}: {error}") from error


def grouped(rows: Iterator[str], document_start: str) -> Iterator[str]:
    """Concatenate `rows` into documents, each beginning where `document_start` matches the beginning of a row."""
    pattern = re.compile(document_start)
    document: list[str] = []
    for row in rows:
        if document and pattern.match(row):
            yield "".join(document)
            document = []
        document.append(row)
    yield "".join(document)
