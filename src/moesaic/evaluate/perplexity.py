"""Held-out loss: what a model's objective predicts of every document is scored once, and the protocol says how.

A document is cut into windows of `context` tokens whose last `stride` ones are new; windows never cross documents. The
first token follows a start token; the last window is moved back to end with its document, so that it is full too. A
causal model predicts every token, so that its loss is a perplexity of the text; others predict what `data.objective`
says, and a classifier the label of the document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as nnf
from transformers import PreTrainedModel

from moesaic.data.objective import NOT_SCORED, forward, objective_of, positions_of, stacked
from moesaic.data.tokens import TokenSplit
from moesaic.evaluate.batching import independent_batch_size
from moesaic.evaluate.items import Item
from moesaic.evaluate.progress import Progress
from moesaic.evaluate.questions import Questions, Window, questions_of

__all__ = ["DocumentLoss", "Perplexity", "PerplexityConfig", "perplexity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityConfig:
    """How perplexity is measured. `stride` new tokens per window of `context` (None: all of them); at most
    `max_tokens` tokens of the split are scored (None: all), the last document in part.
    """

    context: int
    stride: int | None = None
    batch_size: int = 16
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise ValueError(f"stride={self.stride} is not allowed: 1..context={self.context}, or null for all of it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLoss:
    """Negative log-likelihood of a document's predicted tokens, summed per window, in the order of the text.

    `num_bytes` is None where the document was cut short, or not all of its tokens are predicted.
    """

    id: str
    window_nll_nats: tuple[float, ...]
    window_tokens: tuple[int, ...]
    num_bytes: int | None

    @property
    def nll_nats(self) -> float:
        """Sum over all predicted tokens."""
        return sum(self.window_nll_nats)

    @property
    def num_tokens(self) -> int:
        """Tokens predicted."""
        return sum(self.window_tokens)

    def row(self) -> dict[str, Any]:
        """This document as a row of `documents.parquet`; the windows are what few long documents are resampled by."""
        return {
            "document": self.id,
            "nll": self.nll_nats,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "window_nll": list(self.window_nll_nats),
            "window_tokens": list(self.window_tokens),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """The losses per document, and what they say together; `protocol` is what another measurement must repeat.

    `items` are a classifier's choices, one per document.
    """

    documents: tuple[DocumentLoss, ...]
    protocol: dict[str, Any]
    items: tuple[Item, ...] = ()

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all predicted tokens."""
        return sum(d.nll_nats for d in self.documents) / sum(d.num_tokens for d in self.documents)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss per byte of text over the whole documents; None where there is no whole one."""
        whole = [d for d in self.documents if d.num_bytes]
        if not whole:
            return None
        return sum(d.nll_nats for d in whole) / math.log(2) / sum(d.num_bytes or 0 for d in whole)

    def summary(self) -> dict[str, float | None]:
        """The three means, as they stand in a record."""
        return {name: getattr(self, name) for name in ("nats_per_token", "perplexity", "bits_per_byte")}

    def rows(self) -> list[dict[str, Any]]:
        """One row per document, for `documents.parquet`."""
        return [document.row() for document in self.documents]


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    split: TokenSplit,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int,
    max_tokens: int | None = None,
    start_id: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Losses of `model` on the documents of `split`: of all that its objective predicts, given the rest of the window.

    For a classifier, which predicts one label per document, a "token" is a document. `start_id` is put before each
    document (None: the model's beginning of text, without which many models fall apart, or the split's separator where
    the model has none). Batches hold windows of one length, so that nothing is padded; `progress` counts windows. The
    model's train or eval mode is restored.

    Raises: ValueError for a model without a head that is known, fewer positions than `context`, or settings out of
    range; FloatingPointError for NaN losses.
    """
    config = PerplexityConfig(context=context, stride=stride, batch_size=batch_size, max_tokens=max_tokens)
    _refuse_unfit(model, context)
    objective = objective_of(model, split)
    start_id = _start_of(model, split) if start_id is None else start_id
    taken = _taken(split, max_tokens)
    asked = questions_of(objective, split, taken, context=context, stride=stride, start_id=start_id)
    windows = [window for of_one in asked.by_document for window in of_one]
    batch_size = independent_batch_size(model, batch_size)
    answers: dict[Window, _Answer] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(windows, batch_size):
            answers.update(zip(batch, _answers(model, asked, batch), strict=True))
            if progress is not None:
                progress(len(answers), len(windows))
    finally:
        model.train(was_training)
    documents = [[answers[window] for window in of_one] for of_one in asked.by_document]
    return Perplexity(
        documents=tuple(_document(split, asked, index, of_one) for index, of_one in enumerate(documents)),
        protocol={
            **asdict(config),
            **asked.protocol,
            "objective": objective.name,
            "predicted": objective.about,
            "batch_size": batch_size,
            "corpus": split.provenance,
            "documents": len(documents),
            "tokens_counted": sum(answer.predicted for answer in answers.values()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        items=tuple(answer.item for of_one in documents for answer in of_one if answer.item is not None),
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a model made of one window: the summed loss of the tokens it predicted, and a classifier's choice."""

    nll_nats: float
    predicted: int
    item: Item | None


def _refuse_unfit(model: PreTrainedModel, context: int) -> None:
    positions = positions_of(model.config)
    if positions is not None and context > positions:
        raise ValueError(f"context={context} exceeds the {positions} positions of {type(model).__name__}. Lower it.")


def _start_of(model: PreTrainedModel, split: TokenSplit) -> int:
    begin = getattr(model.config.get_text_config(), "bos_token_id", None)
    return begin if isinstance(begin, int) else split.separator_id


def _taken(split: TokenSplit, max_tokens: int | None) -> list[int]:
    """How many tokens of each document are scored, in the order of the split, until `max_tokens`."""
    taken: list[int] = []
    left = split.num_tokens if max_tokens is None else max_tokens
    for document in split.documents:
        if left <= 0:
            break
        taken.append(min(document.num_tokens, left))
        left -= taken[-1]
    return taken


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    for _, group in groupby(sorted(windows, key=lambda window: -window.length), key=lambda window: window.length):
        same = list(group)
        yield from (same[at : at + batch_size] for at in range(0, len(same), batch_size))


def _answers(model: PreTrainedModel, asked: Questions, batch: Sequence[Window]) -> Iterator[_Answer]:
    inputs, labels_NL = stacked([asked.ask(window) for window in batch])
    logits = forward(model, {name: column.to(model.device) for name, column in inputs.items()}).logits
    for window, row, labels_L in zip(batch, logits, labels_NL.to(logits.device), strict=True):
        predicted_L = labels_L != NOT_SCORED
        rows = row.view(len(labels_L), -1)[predicted_L].float()
        gold = labels_L[predicted_L]
        loss = nnf.cross_entropy(rows, gold, reduction="none").double().sum().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the model's loss is {loss} (document {window.document}, token {window.begin}).")
        item = None
        if asked.about_documents:
            options = tuple(rows[0].double().log_softmax(0).tolist())
            item = Item(id=str(window.document), gold=int(gold), option_loglik=options)
        yield _Answer(loss, len(gold), item)


def _document(split: TokenSplit, asked: Questions, index: int, answers: Sequence[_Answer]) -> DocumentLoss:
    return DocumentLoss(
        id=split.documents[index].id,
        window_nll_nats=tuple(answer.nll_nats for answer in answers),
        window_tokens=tuple(answer.predicted for answer in answers),
        num_bytes=asked.num_bytes(index),
    )
