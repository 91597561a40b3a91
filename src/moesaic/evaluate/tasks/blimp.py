"""BLiMP: which sentence of a minimal pair is grammatical? Read from a local folder of `*.jsonl.gz`, one per paradigm.

Source: arXiv:1912.00582. Differs: no space is put before a sentence (lm-eval's own BLiMP task does that).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moesaic.evaluate.tasks.base import PackagedTask, Question, refuse_missing

if TYPE_CHECKING:
    from moesaic.data.corpus import Document

__all__ = ["Blimp"]

FILES = "*.jsonl.gz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blimp(PackagedTask):
    """Two-way choice over all paradigms in `folder`; `limit_per_paradigm` takes the first so many pairs of each.

    Every paradigm has the same number of pairs, so the mean over items is the mean over paradigms.
    """

    folder: Path
    limit_per_paradigm: int | None = None

    pmi: ClassVar[bool] = False  # there is no context to take away

    def __post_init__(self) -> None:
        if self.limit_per_paradigm is not None and self.limit_per_paradigm < 1:
            raise ValueError(f"limit_per_paradigm={self.limit_per_paradigm} must be at least 1, or null for all pairs.")

    def check(self, path: str) -> None:
        refuse_missing(any(self.folder.glob(FILES)), f"{path}.folder", self.folder, f"BLiMP files ({FILES})")

    def questions(self, documents: Sequence[Document], *, seed: int) -> list[Question]:
        """All pairs; neither documents nor seed matter."""
        return [question for file in sorted(self.folder.glob(FILES)) for question in self._paradigm(file)]

    def _paradigm(self, file: Path) -> Iterator[Question]:
        name = file.name.removesuffix(FILES[1:])
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, self.limit_per_paradigm)):
                pair = json.loads(line)
                options = [pair["sentence_bad"]]
                # The right place alternates: a model that prefers neither would else be right each time.
                options.insert(number % 2, pair["sentence_good"])
                yield Question(id=f"{name}:{number}", context="", options=tuple(options), gold=number % 2)
