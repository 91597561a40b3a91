"""What a model is trained and judged on: from rows of tokens to one forward call, and to what it has to predict.

There is one objective per kind of head, and the model says which: nobody configures it.
Shapes: N rows, C tokens in a row (context), L tokens of one sequence.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.data.corpus import DataError
from moesaic.data.tokens import TokenSplit
from moesaic.sparse.model import head_of
from moesaic.training.loader import Batch, RowBatches

__all__ = [
    "NOT_SCORED",
    "Classification",
    "MaskedToken",
    "NextToken",
    "Objective",
    "ObjectiveBatches",
    "SecondHalf",
    "TokenObjective",
    "forward",
    "objective_of",
    "positions_of",
    "stacked",
    "task_loss",
]

NOT_SCORED = -100  # the label of what counts in no loss, here and in transformers
_MASKED_FRAC = 0.15  # BERT's share

Columns = Mapping[str, Tensor | np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(ABC):
    """How a split becomes forward arguments and labels. Subclasses say what is predicted from what."""

    name: ClassVar[str]
    about: ClassVar[str]  # what a record's protocol says is predicted

    @abstractmethod
    def columns(self, split: TokenSplit, context: int) -> Columns:
        """Training rows of at most `context` tokens. Raises DataError where there is none, or not of this kind."""

    @abstractmethod
    def tokens_per_row(self, columns: Columns) -> float:
        """How many tokens of a row an FFN sees, on average."""

    @abstractmethod
    def batch(self, rows: Batch, keys: Sequence[str]) -> Batch:
        """Forward arguments, labels included, of training rows; what is random in row i depends on `keys[i]` alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenObjective(Objective):
    """A language model's: tokens are predicted, and rows are blocks of text cut across document borders."""

    whole_text: ClassVar[bool] = False  # True: every token is predicted, so that there is a loss per byte
    extra_inputs: ClassVar[int] = 1  # inputs of a sequence beyond the tokens that it may predict

    def columns(self, split: TokenSplit, context: int) -> Columns:
        return {"input_ids": split.blocks(context)}

    def tokens_per_row(self, columns: Columns) -> float:
        return columns["input_ids"].shape[1]

    def batch(self, rows: Batch, keys: Sequence[str]) -> Batch:
        pairs = [self.question(ids_C, len(ids_C) - 1, key) for ids_C, key in zip(rows["input_ids"], keys, strict=True)]
        inputs, labels = stacked(pairs)
        return {**inputs, "labels": labels}

    @abstractmethod
    def question(self, ids_L: Tensor, scored: int, key: str) -> tuple[Batch, Tensor]:
        """Forward arguments of one sequence without its labels, and the labels that its logits are compared with.

        At most the last `scored` tokens of `ids_L` are predicted; other labels are `NOT_SCORED`. L is 2 or more.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken(TokenObjective):
    """Causal language models: every token from those before it."""

    name: ClassVar[str] = "next_token"
    about: ClassVar[str] = "every token, from those before it"
    whole_text: ClassVar[bool] = True
    extra_inputs: ClassVar[int] = 0

    def batch(self, rows: Batch, keys: Sequence[str]) -> Batch:
        # Such models shift the labels themselves, and the labels are the inputs: `task_loss` knows that.
        return rows

    def question(self, ids_L: Tensor, scored: int, key: str) -> tuple[Batch, Tensor]:
        return {"input_ids": ids_L[:-1]}, last(ids_L[1:], scored)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedToken(TokenObjective):
    """Masked language models: 15 % of the tokens, each replaced by [MASK], from all others.

    The first token gives way to the start token, which encoders expect there. Source: arXiv:1810.04805 sec. 3.1.
    Differs: always [MASK], never a random or the true token (arXiv:2202.08005 sec. 5: no worse).
    """

    mask_id: int
    start_id: int

    name: ClassVar[str] = "masked_token"
    about: ClassVar[str] = f"{_MASKED_FRAC:.0%} of the tokens, masked, from all others; the same ones every time"

    def question(self, ids_L: Tensor, scored: int, key: str) -> tuple[Batch, Tensor]:
        inputs_L, labels_L = ids_L.clone(), torch.full_like(ids_L, NOT_SCORED)
        inputs_L[0] = self.start_id
        order = torch.randperm(scored, generator=generator_of(key))
        hidden = len(ids_L) - scored + order[: max(1, round(_MASKED_FRAC * scored))]
        labels_L[hidden] = inputs_L[hidden]
        inputs_L[hidden] = self.mask_id
        return {"input_ids": inputs_L}, labels_L


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondHalf(TokenObjective):
    """Encoder-decoders: the second half of a row, token by token, by the decoder, from the first half in the encoder.

    So the FFNs of both stacks see equally many tokens. Source: arXiv:1910.10683 sec. 3.1.4 and 3.3.1 (the prefix
    language-modelling objective). Differs: always cut in the middle, no task prefix.
    """

    decoder_start_id: int

    name: ClassVar[str] = "second_half"
    about: ClassVar[str] = "the second half of each window, by the decoder, from its first half in the encoder"

    def columns(self, split: TokenSplit, context: int) -> Columns:
        if context % 2:
            raise DataError(f"context={context} has no two equal halves for encoder and decoder; use an even number")
        return {"input_ids": split.blocks(context)}

    def tokens_per_row(self, columns: Columns) -> float:
        return columns["input_ids"].shape[1] // 2

    def question(self, ids_L: Tensor, scored: int, key: str) -> tuple[Batch, Tensor]:
        first, second = ids_L[: len(ids_L) // 2], ids_L[len(ids_L) // 2 :]
        shifted = torch.cat([second.new_tensor([self.decoder_start_id]), second[:-1]])
        return {"input_ids": first, "decoder_input_ids": shifted}, last(second, scored)


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification(Objective):
    """Sequence classifiers: the label of a document, framed by the start and separator tokens and cut to the context.

    Training rows are padded, and an attention mask says where; a batch is as long as its longest document.
    """

    start_id: int
    end_id: int
    pad_id: int
    num_labels: int

    name: ClassVar[str] = "classification"
    about: ClassVar[str] = "the label of each document, from all of it; a token counted is a document"

    def columns(self, split: TokenSplit, context: int) -> Columns:
        rows = [self.framed(split, index, context) for index in range(len(split.documents))]
        lengths_N = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            "attention_mask": (torch.arange(int(lengths_N.max())) < lengths_N[:, None]).long(),
            "labels": torch.tensor([self.label(split, index) for index in range(len(rows))]),
        }

    def tokens_per_row(self, columns: Columns) -> float:
        mask_NC = columns["attention_mask"]
        return int(mask_NC.sum()) / len(mask_NC)

    def framed(self, split: TokenSplit, index: int, context: int) -> Tensor:
        """int64 (L,): document `index` between its frame, at most `context` tokens in all."""
        if context < 3:
            raise DataError(
                f"context={context} leaves no room between the start and the separator token; use 3 or more"
            )
        ids = split.tokens_of(split.documents[index])[: context - 2].astype(np.int64)
        return torch.from_numpy(np.concatenate([[self.start_id], ids, [self.end_id]]))

    def label(self, split: TokenSplit, index: int) -> int:
        """The class of document `index`. Raises DataError where it has none, or one that the model does not know."""
        document = split.documents[index]
        if document.label is None or document.label >= self.num_labels:
            what = "has no label" if document.label is None else f"has label {document.label}"
            raise DataError(
                f"document {document.id} of {split.provenance.get('name')} {what}, but the model tells classes "
                f"0..{self.num_labels - 1} apart. Use a labelled corpus (data=line_order, labelled, acceptability)."
            )
        return document.label

    def batch(self, rows: Batch, keys: Sequence[str]) -> Batch:
        longest = int(rows["attention_mask"].sum(dim=1).max())
        return {name: column if name == "labels" else column[:, :longest] for name, column in rows.items()}


class ObjectiveBatches(RowBatches):
    """Training batches of an objective: forward arguments with labels, a pure function of (seed, number) as all are."""

    def __init__(self, objective: Objective, split: TokenSplit, *, context: int, batch_size: int, seed: int) -> None:
        columns = objective.columns(split, context)
        rows_N = torch.arange(len(columns["input_ids"]))
        super().__init__({**columns, "row": rows_N}, batch_size=batch_size, seed=seed)
        self.objective = objective

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * int(self.columns["input_ids"].shape[1])

    def batch(self, index: int) -> Batch:
        rows = {name: column.long() for name, column in super().batch(index).items()}
        # The number of the batch is in the key: on its next pass, a row is masked elsewhere.
        keys = [f"{self.seed}/{index}/{row}" for row in rows.pop("row").tolist()]
        return self.objective.batch(rows, keys)


def objective_of(model: PreTrainedModel, split: TokenSplit) -> Objective:
    """The objective of `model`'s head, with the special tokens that `split` and the model's config name.

    Raises ValueError where one is missing that the objective needs.
    """
    head, config = head_of(model), model.config
    start_id = split.separator_id if split.start_id is None else split.start_id
    if head == "masked_lm":
        mask_id = _needed(
            split.mask_id, f"{type(model).__name__} is a masked language model: its tokenizer has no [MASK]"
        )
        return MaskedToken(mask_id=mask_id, start_id=start_id)
    if head == "seq2seq_lm":
        first_id = getattr(config, "decoder_start_token_id", None)
        return SecondHalf(decoder_start_id=_needed(first_id, f"{type(model).__name__} names no decoder_start_token_id"))
    if head == "sequence_classification":
        pad_id = split.separator_id if config.pad_token_id is None else config.pad_token_id
        labels = config.id2label or {}
        return Classification(start_id=start_id, end_id=split.separator_id, pad_id=pad_id, num_labels=len(labels))
    return NextToken()


def forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """The output of `model` on a batch of its objective: the one forward call of training and calibration."""
    return model(**batch, use_cache=False)


def task_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy in nats of a batch of the model's objective: what every recipe's task loss is.

    A batch without labels is one of next tokens: causal models take their inputs as labels, and shift them.
    """
    return forward(model, {"labels": batch["input_ids"], **batch}).loss


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a sequence may have; None without a limit. RoBERTa's first positions belong to its padding."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or "roberta" not in config.model_type:
        return positions
    return positions - 1 - (config.pad_token_id or 0)


def stacked(pairs: Sequence[tuple[Batch, Tensor]]) -> tuple[Batch, Tensor]:
    """Questions of equal length as one batch."""
    inputs = {name: torch.stack([each[name] for each, _ in pairs]) for name in pairs[0][0]}
    return inputs, torch.stack([labels for _, labels in pairs])


def last(labels_L: Tensor, scored: int) -> Tensor:
    """`labels_L` of which only the last `scored` count."""
    labels_L = labels_L.clone()
    labels_L[: max(0, len(labels_L) - scored)] = NOT_SCORED
    return labels_L


def generator_of(key: str) -> torch.Generator:
    """A generator that depends on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _needed(token_id: int | None, complaint: str) -> int:
    if token_id is None:
        raise ValueError(f"{complaint}. Use another backbone or tokenizer.")
    return token_id
