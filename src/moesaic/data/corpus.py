"""What a corpus is: named documents in two splits, train and held-out."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

__all__ = ["Corpus", "DataError", "Document", "Split", "digest_of"]

Split = Literal["train", "heldout"]


class DataError(ValueError):
    """Input data that is missing, unreadable or empty; the message names the path and says what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it has within its split; `label` counts from 0 where the corpus is a classification."""

    id: str
    text: str
    label: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus(ABC):
    """A source of documents. Subclasses say how to `read` a split; everybody else calls `documents`."""

    # A label for tables and folder names; the content is what counts.
    name: str = field(metadata={"identity": False})

    @abstractmethod
    def read(self, split: Split) -> Iterator[Document]:
        """The documents of `split`, in the same order every time, empty ones included.

        Raises:
            DataError: the source cannot be read.
        """

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of `split` that have any text, in the same order every time.

        Raises:
            ValueError: `split` is neither train nor heldout.
            DataError: the source cannot be read, or holds no text.
        """
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is not one of {', '.join(get_args(Split))}")
        empty = True
        for document in self.read(split):
            if document.text:
                empty = False
                yield document
        if empty:
            raise DataError(f"data {self.name}: the {split} split is empty. Looked at: {self.describe(split)}")

    @abstractmethod
    def describe(self, split: Split) -> str:
        """Where the documents of `split` come from, for messages: a path or an address."""

    @abstractmethod
    def fingerprint(self) -> str:
        """10 hex digits that change when the content does."""

    def provenance(self) -> dict[str, str]:
        """What a record says about the corpus."""
        return {"name": self.name, "fingerprint": self.fingerprint()}


def digest_of(parts: Iterator[bytes]) -> str:
    """10 hex digits of sha256 over `parts`, each preceded by its length so that shifted borders differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:10]
