"""Labelled corpora: every document is an example of one of a few classes, which a classifier is to tell.

`labels` names the classes in the order in which documents count them; a classifying backbone takes them from here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.data.corpus import Corpus, DataError, Document, Split, digest_of
from moesaic.data.files import Jsonl, digest_of_file, json_rows, value_of
from moesaic.data.stdlib import hash_of, is_heldout

__all__ = ["LabelledJsonl", "LineOrder", "SentencePairs"]

_PAIR_FILES = "*.jsonl*"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledJsonl(Jsonl):
    """JSON lines with a class under `label_key`, whose text (or number) is one of `labels`."""

    labels: tuple[str, ...]
    label_key: str = "label"

    def __post_init__(self) -> None:
        check_labels(self.labels)

    def label_of(self, row: dict[str, Any], path: Path, number: int) -> int:
        label = str(value_of(row, self.label_key, path, number))
        if label not in self.labels:
            raise DataError(
                f"{path}:{number}: '{self.label_key}' is {label!r}, which is none of data.labels: "
                f"{', '.join(self.labels)}."
            )
        return self.labels.index(label)


@dataclass(frozen=True, kw_only=True, slots=True)
class LineOrder(Corpus):
    """Are these lines in their order? Stretches of `lines` lines of `text`, every other one with its halves exchanged.

    Blank lines are passed over, stretches do not overlap, and a hash of its name decides which class a stretch is made
    an example of. Source: arXiv:1909.11942 sec. 3.1 (sentence-order prediction). Differs: lines for sentences.
    """

    text: Corpus
    lines: int = 4
    labels: tuple[str, str] = ("exchanged", "in_order")

    def __post_init__(self) -> None:
        if self.lines < 2 or self.lines % 2:
            raise ValueError(f"lines={self.lines} has no two equal halves; use an even number from 2")

    def read(self, split: Split) -> Iterator[Document]:
        for document in self.text.documents(split):
            lines = [line for line in document.text.splitlines() if line.strip()]
            for first in range(0, len(lines) - self.lines + 1, self.lines):
                yield self._example(f"{document.id}#{first // self.lines}", lines[first : first + self.lines])

    def _example(self, name: str, lines: list[str]) -> Document:
        half = self.lines // 2
        label = hash_of(f"label/{name}") % 2
        return Document(name, "\n".join(lines if label else lines[half:] + lines[:half]), label)

    def describe(self, split: Split) -> str:
        return f"stretches of {self.lines} lines of {self.text.describe(split)}"

    def fingerprint(self) -> str:
        return digest_of(part.encode() for part in (self.text.fingerprint(), str(self.lines)))

    def provenance(self) -> dict[str, str]:
        return {**self.text.provenance(), "name": self.name, "fingerprint": self.fingerprint()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePairs(Corpus):
    """Is this sentence acceptable? Both sentences of minimal pairs, as single sentences: a stand-in for CoLA.

    `folder` holds .jsonl or .jsonl.gz files of `sentence_good` and `sentence_bad` (BLiMP's, arXiv:1912.00582). Pairs
    are held out whole, by a hash of their sentences, and their order is that of another hash: any beginning of a split
    is a fair sample of it.
    """

    folder: Path
    heldout_frac: float = 0.1  # share of the pairs, 0..1
    labels: tuple[str, str] = ("unacceptable", "acceptable")

    def __post_init__(self) -> None:
        if not 0 < self.heldout_frac < 1:
            raise ValueError(f"heldout_frac={self.heldout_frac} must be between 0 and 1")

    def read(self, split: Split) -> Iterator[Document]:
        pairs = {}
        for path in self._files():
            for number, row in json_rows(path):
                bad, good = (str(value_of(row, f"sentence_{kind}", path, number)) for kind in ("bad", "good"))
                if is_heldout(f"{bad}\n{good}", self.heldout_frac) == (split == "heldout"):
                    pairs[f"{path.name.partition('.')[0]}:{number}"] = (bad, good)
        examples = [
            Document(f"{name}:{self.labels[label]}", text, label)
            for name, pair in pairs.items()
            for label, text in enumerate(pair)
        ]
        yield from sorted(examples, key=lambda example: hash_of(f"order/{example.id}"))

    def describe(self, split: Split) -> str:
        return f"{self.folder}/{_PAIR_FILES} with heldout_frac={self.heldout_frac}"

    def fingerprint(self) -> str:
        files = (path.name.encode() + digest_of_file(path) for path in self._files())
        return digest_of(iter([*files, str(self.heldout_frac).encode()]))

    def _files(self) -> list[Path]:
        found = sorted(self.folder.glob(_PAIR_FILES))
        if not found:
            raise DataError(f"{self.folder} has no {_PAIR_FILES} files of sentence pairs. Set data.folder to theirs.")
        return found


def check_labels(labels: tuple[str, ...]) -> None:
    """Raise ValueError unless there are at least two different classes."""
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError(f"labels={list(labels)} must name at least two different classes")
