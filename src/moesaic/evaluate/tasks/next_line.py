"""Next-line choice: which of four lines comes next in a held-out document?

The three wrong lines are real lines, some of the same document and the rest of others, moved to the right line's
indentation so that the column does not give the answer away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.evaluate.tasks.base import PackagedTask, Question

if TYPE_CHECKING:
    from moesaic.data.corpus import Document

__all__ = ["NextLine"]

OPTIONS = 4
LINE_CHARS = (12, 120)  # shorter lines (`else:`, `)`) fit everywhere, longer ones are data rather than code
TRIES = 50  # draws per wrong line of another document before a question is given up


@dataclass(frozen=True, kw_only=True, slots=True)
class NextLine(PackagedTask):
    """Four-way choice of the next line. The documents take turns, so that no long one dominates.

    `limit` is the number of questions, `context_lines` the lines shown before, `same_document` (0..3) how many of the
    three wrong lines come from the same document.
    """

    limit: int = 200
    context_lines: int = 12
    same_document: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.same_document < OPTIONS:
            raise ValueError(f"same_document={self.same_document} is not allowed: 0..{OPTIONS - 1} of the wrong lines.")
        for name in ("limit", "context_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def questions(self, documents: Sequence[Document], *, seed: int) -> list[Question]:
        """At most `limit` questions; the same for equal documents and seed."""
        rng = random.Random(f"next_line:{seed}")
        pages = [_page(document, self.context_lines, rng) for document in documents]
        pages = [page for page in rng.sample(pages, len(pages)) if page.usable]
        found: list[Question] = []
        for turn in range(max((len(page.usable) for page in pages), default=0)):
            for page in pages:
                if turn < len(page.usable) and len(found) < self.limit:
                    found += self._question(page, page.usable[turn], pages, rng)
        return found

    def _question(self, page: _Page, at: int, pages: list[_Page], rng: random.Random) -> list[Question]:
        """The question about line `at` of `page`, or nothing where three different wrong lines cannot be found."""
        gold = page.lines[at].strip()
        own = sorted(page.texts - {gold})
        if len(own) < self.same_document:
            return []
        options = rng.sample(own, self.same_document)
        options += _from_others(pages, page.texts, OPTIONS - 1 - self.same_document, rng)
        if len(options) < OPTIONS - 1:
            return []
        gold_at = rng.randrange(OPTIONS)
        options.insert(gold_at, gold)
        indent = page.lines[at][: -len(page.lines[at].lstrip())]
        question = Question(
            id=f"{page.id}:{at + 1}",
            context="\n".join(page.lines[at - self.context_lines : at]),
            options=tuple(f"\n{indent}{line}" for line in options),
            gold=gold_at,
        )
        return [question]


@dataclass(frozen=True, slots=True)
class _Page:
    """A document's lines, the positions that can be asked about (shuffled), and the texts found there."""

    id: str
    lines: list[str]
    usable: list[int]
    texts: frozenset[str]


def _page(document: Document, context_lines: int, rng: random.Random) -> _Page:
    lines = [line.rstrip() for line in document.text.splitlines()]
    shortest, longest = LINE_CHARS
    usable = [at for at, line in enumerate(lines) if shortest <= len(line.strip()) <= longest and at >= context_lines]
    # The harness moves blanks at the end of a context into every option: a blank line there would be scored too.
    usable = [at for at in usable if lines[at - 1]]
    texts = frozenset(lines[at].strip() for at in usable)
    return _Page(document.id, lines, rng.sample(usable, len(usable)), texts)


def _from_others(pages: list[_Page], avoid: frozenset[str], count: int, rng: random.Random) -> list[str]:
    """`count` different lines, each of a page drawn at random, none in `avoid`; fewer where there are too few."""
    found: list[str] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        page = rng.choice(pages)
        line = page.lines[rng.choice(page.usable)].strip()
        if line not in avoid and line not in found:
            found.append(line)
    return found
