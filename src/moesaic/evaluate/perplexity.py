"""Held-out perplexity: every token of every document is scored once, and the protocol says how.

A document is cut into windows of `context` tokens whose last `stride` ones are new; windows never cross documents. The
first token follows a start token; the last window is moved back to end with its document, so that it is full too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenSplit
from moesaic.evaluate.batching import independent_batch_size
from moesaic.evaluate.progress import Progress

__all__ = ["DocumentLoss", "Perplexity", "PerplexityConfig", "Window", "perplexity", "windows_of"]


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
    """Negative log-likelihood of a document's scored tokens, summed per window, in the order of the text.

    `num_bytes` is None where the document was cut short.
    """

    id: str
    window_nll_nats: tuple[float, ...]
    window_tokens: tuple[int, ...]
    num_bytes: int | None

    @property
    def nll_nats(self) -> float:
        """Sum over all scored tokens."""
        return sum(self.window_nll_nats)

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
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
    """The losses per document, and what they say together; `protocol` is what another measurement must repeat."""

    documents: tuple[DocumentLoss, ...]
    protocol: dict[str, Any]

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all scored tokens."""
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


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `begin`..`end`-1 of a document that starts with its start token; the last `scored` predictions count.

    The prediction made at input i is about input i + 1, so a window needs no label that it has not been given.
    """

    document: int
    begin: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        """Input tokens."""
        return self.end - self.begin


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
    """Losses of a causal `model` on the documents of `split`, every token given all that its window holds before it.

    `start_id` is put before each document (None: the model's beginning of text, without which many models fall apart,
    or the split's separator where the model has none). Batches hold windows of one length, so that nothing is padded;
    `progress` counts windows. The model's train or eval mode is restored.

    Raises: ValueError for a model that is not causal, has fewer positions than `context`, or settings out of range;
    FloatingPointError for NaN losses.
    """
    config = PerplexityConfig(context=context, stride=stride, batch_size=batch_size, max_tokens=max_tokens)
    _refuse_unfit(model, context)
    start = _start_of(model, split) if start_id is None else start_id
    taken = _taken(split, max_tokens)
    documents = [_tokens(split, index, count, start) for index, count in enumerate(taken)]
    by_document = [list(windows_of(index, count, context, stride or context)) for index, count in enumerate(taken)]
    windows = [window for of_one in by_document for window in of_one]
    batch_size = independent_batch_size(model, batch_size)
    nll: dict[Window, float] = {}
    was_training = model.training
    model.eval()
    try:
        done = 0
        for batch in _batches(windows, batch_size):
            nll.update(zip(batch, _losses(model, documents, batch), strict=True))
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(was_training)
    return Perplexity(
        documents=tuple(_document(split, of_one, nll) for of_one in by_document),
        protocol={
            **asdict(config),
            "stride": stride or context,
            "batch_size": batch_size,
            "corpus": split.provenance,
            "documents": len(documents),
            "tokens_counted": sum(taken),
            "first_token": f"scored, after start token {start}",
            "windows": "inside documents; the last one ends with its document",
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )


def windows_of(document: int, num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of the document's tokens exactly once."""
    end = min(context, num_tokens)
    yield Window(document, 0, end, end)
    while end < num_tokens:
        previous, end = end, min(end + stride, num_tokens)
        yield Window(document, end - context, end, end - previous)


def _refuse_unfit(model: PreTrainedModel, context: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"context={context} exceeds the {positions} positions of {type(model).__name__}. Lower it.")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"perplexity needs a causal language model, and {type(model).__name__} is none: it has no next-token loss "
            "of whole documents. Choose a causal backbone."
        )


def _start_of(model: PreTrainedModel, split: TokenSplit) -> int:
    begin = model.config.get_text_config().bos_token_id
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


def _tokens(split: TokenSplit, index: int, count: int, start: int) -> Tensor:
    tokens = torch.from_numpy(split.tokens_of(split.documents[index])[:count].astype("int64"))
    return torch.cat([torch.tensor([start]), tokens])


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    for _, group in groupby(sorted(windows, key=lambda window: -window.length), key=lambda window: window.length):
        same = list(group)
        yield from (same[at : at + batch_size] for at in range(0, len(same), batch_size))


def _losses(model: PreTrainedModel, documents: Sequence[Tensor], batch: Sequence[Window]) -> Iterator[float]:
    inputs = torch.stack([documents[w.document][w.begin : w.end] for w in batch]).to(model.device)
    logits = model(input_ids=inputs, use_cache=False).logits
    for window, row in zip(batch, logits, strict=True):
        target = documents[window.document][window.begin + 1 : window.end + 1][-window.scored :].to(row.device)
        loss = nnf.cross_entropy(row[-window.scored :].float(), target, reduction="none").double().sum().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the model's loss is {loss} (document {window.document}, token {window.begin}).")
        yield loss


def _document(split: TokenSplit, windows: Sequence[Window], nll: Mapping[Window, float]) -> DocumentLoss:
    document = split.documents[windows[0].document]
    return DocumentLoss(
        id=document.id,
        window_nll_nats=tuple(nll[window] for window in windows),
        window_tokens=tuple(window.scored for window in windows),
        num_bytes=document.num_bytes if windows[-1].end == document.num_tokens else None,
    )
