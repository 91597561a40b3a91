"""Story endings: which of four sentences ends a story? The three wrong ones are the last sentences of other stories."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.evaluate.tasks.base import PackagedTask, Question, refuse_missing

if TYPE_CHECKING:
    from moesaic.data.corpus import Document

__all__ = ["StoryEnding"]

OPTIONS = 4
SENTENCE_GAP = re.compile(r"(?<=[.!?])[\"']?(\s+)(?=\S)")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryEnding(PackagedTask):
    """Four-way choice of a story's last sentence. `file` is a text file of stories split by `separator`.

    The first `limit` stories with at least two sentences are asked about; wrong endings come from all stories.
    """

    file: Path
    separator: str = "<|endoftext|>"
    limit: int = 200

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1.")

    def check(self, path: str) -> None:
        refuse_missing(self.file.is_file(), f"{path}.file", self.file, "a text file of stories")

    def questions(self, documents: Sequence[Document], *, seed: int) -> list[Question]:
        """At most `limit` questions; the held-out documents are not used."""
        stories = self.file.read_text(encoding="utf-8").split(self.separator)
        endings = {index: ending for index, story in enumerate(stories) if (ending := _ending(story.strip()))}
        pool = sorted({ending[2] for ending in endings.values()})
        asked = list(endings.items())[: self.limit]
        return [_question(index, *ending, pool, seed) for index, ending in asked if len(pool) >= OPTIONS]


def _ending(story: str) -> tuple[str, str, str] | None:
    """`(beginning, gap, last sentence)` of a story, or None where it is a single sentence."""
    gaps = list(SENTENCE_GAP.finditer(story))
    if not gaps:
        return None
    return story[: gaps[-1].start(1)], gaps[-1][1], story[gaps[-1].end(1) :]


def _question(index: int, beginning: str, gap: str, gold: str, pool: list[str], seed: int) -> Question:
    rng = random.Random(f"story_ending:{seed}:{index}")
    options = [ending for ending in rng.sample(pool, OPTIONS) if ending != gold][: OPTIONS - 1]
    gold_at = rng.randrange(OPTIONS)
    options.insert(gold_at, gold)
    return Question(id=str(index), context=beginning, options=tuple(f"{gap}{line}" for line in options), gold=gold_at)
