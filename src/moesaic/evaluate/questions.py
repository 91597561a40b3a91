"""What a model is asked about held-out documents: windows of text, or whole documents that a classifier is to label.

Shapes: L tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.data.objective import Classification, Objective, TokenObjective
from moesaic.data.tokens import TokenSplit
from moesaic.training.loader import Batch

__all__ = ["LabelQuestions", "Questions", "TextQuestions", "Window", "questions_of", "windows_of"]


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `begin`..`end`-1 of a document that starts with its start token; the last `scored` predictions count.

    The prediction that a causal model makes at input i is about input i + 1, so a window needs no label that it has not
    been given; other models are given that last one too.
    """

    document: int
    begin: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        """Input tokens."""
        return self.end - self.begin


class Questions(ABC):
    """All that is asked: `by_document[i]` are the windows of document i, `protocol` what a record says about them."""

    by_document: list[list[Window]]
    protocol: dict[str, Any]
    about_documents = False  # True: one answer per document, a choice between its classes

    @abstractmethod
    def ask(self, window: Window) -> tuple[Batch, Tensor]:
        """Forward arguments of one window, and the labels (one per row of logits) that its answer is compared with."""

    @abstractmethod
    def num_bytes(self, document: int) -> int | None:
        """UTF-8 bytes of a document whose every token is predicted; None for others."""


class TextQuestions(Questions):
    """What a language model is asked of the first `taken[i]` tokens of each document i, after the token `start_id`.

    Raises ValueError where `context` is too short for the objective.
    """

    def __init__(
        self,
        objective: TokenObjective,
        split: TokenSplit,
        taken: Sequence[int],
        *,
        context: int,
        stride: int | None,
        start_id: int,
    ) -> None:
        longest = context - objective.extra_inputs
        if longest < 1:
            raise ValueError(f"context={context} leaves {objective.name} nothing to predict from. Use 2 or more.")
        stride = min(stride or longest, longest)
        self.objective, self.split = objective, split
        self.texts = [_tokens(split, index, count, start_id) for index, count in enumerate(taken)]
        self.by_document = [list(windows_of(index, count, longest, stride)) for index, count in enumerate(taken)]
        self.protocol = {
            "stride": stride,
            "first_token": f"scored, after start token {start_id}",
            "windows": "inside documents; the last one ends with its document",
        }

    def ask(self, window: Window) -> tuple[Batch, Tensor]:
        key = f"{self.split.documents[window.document].id}/{window.begin}"
        return self.objective.question(self.texts[window.document][window.begin : window.end + 1], window.scored, key)

    def num_bytes(self, document: int) -> int | None:
        told = self.split.documents[document]
        whole = self.by_document[document][-1].end == told.num_tokens
        return told.num_bytes if whole and self.objective.whole_text else None


class LabelQuestions(Questions):
    """What a classifier is asked: the label of each of the first `count` documents, cut to `context` tokens."""

    about_documents = True

    def __init__(self, objective: Classification, split: TokenSplit, count: int, *, context: int) -> None:
        self.objective, self.split = objective, split
        self.framed = [objective.framed(split, index, context) for index in range(count)]
        self.by_document = [[Window(index, 0, len(ids_L), 1)] for index, ids_L in enumerate(self.framed)]
        self.protocol = {"stride": None, "windows": "a document each, cut to the context"}

    def ask(self, window: Window) -> tuple[Batch, Tensor]:
        label = self.objective.label(self.split, window.document)
        return {"input_ids": self.framed[window.document]}, torch.tensor([label])

    def num_bytes(self, document: int) -> int | None:
        return None


def questions_of(
    objective: Objective, split: TokenSplit, taken: Sequence[int], *, context: int, stride: int | None, start_id: int
) -> Questions:
    """What `objective` asks of the first `taken[i]` tokens of each document i."""
    if isinstance(objective, Classification):
        return LabelQuestions(objective, split, len(taken), context=context)
    assert isinstance(objective, TokenObjective)
    return TextQuestions(objective, split, taken, context=context, stride=stride, start_id=start_id)


def windows_of(document: int, num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of the document's tokens exactly once."""
    end = min(context, num_tokens)
    yield Window(document, 0, end, end)
    while end < num_tokens:
        previous, end = end, min(end + stride, num_tokens)
        yield Window(document, end - context, end, end - previous)


def _tokens(split: TokenSplit, index: int, count: int, start_id: int) -> Tensor:
    tokens = torch.from_numpy(split.tokens_of(split.documents[index])[:count].astype("int64"))
    return torch.cat([torch.tensor([start_id]), tokens])
