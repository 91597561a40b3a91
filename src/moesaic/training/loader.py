"""Batches whose content is a pure function of (seed, number), so that a position is all there is to resume.

Rows are drawn in a fresh order on every pass over the data; batch i holds rows i * batch_size ... of that endless
stream, so a batch may straddle two passes and none is ever short.

Shapes: N rows, C tokens in a row (context).
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Batches", "RowBatches", "TokenBatches", "order_of_pass", "take_rows"]

Batch = dict[str, Tensor]


class Batches(ABC):
    """A resumable iterable of `steps` batches. Subclasses say what batch number `index` holds.

    Iterating again after the last batch begins a new round of `steps` batches that continues the stream.
    """

    def __init__(self, *, seed: int, steps: int, first: int = 0) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self.seed = seed
        self.steps = steps
        self.first = first
        self.position = 0

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Batch number `index` of the endless stream: the same for the same seed, whatever was drawn before."""

    @property
    @abstractmethod
    def tokens_per_batch(self) -> int:
        """Tokens in one batch, over all processes; for reporting speed and counting training tokens."""

    def with_steps(self, steps: int) -> Self:
        """The same stream from its beginning, `steps` batches long."""
        other = copy.copy(self)
        Batches.__init__(other, seed=self.seed, steps=steps, first=self.first)
        return other

    def after(self, number: int) -> Self:
        """The same stream without its first `number` batches: what one fit leaves to the next."""
        other = copy.copy(self)
        Batches.__init__(other, seed=self.seed, steps=self.steps, first=self.first + number)
        return other

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            index = self.position
            # Counted before the yield: a checkpoint taken while this batch is being used already names the next one.
            self.position += 1
            yield self.batch(self.first + index)
            if self.position % self.steps == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])


class RowBatches(Batches):
    """Batches of rows from equally long columns, e.g. hidden states (N, D) and labels (N, B).

    `columns` are tensors or numpy arrays (memory-mapped ones are read row by row); a batch maps each name to
    `batch_size` rows in the column's own dtype. Without `steps`, a round is one pass, rounded down to whole batches.
    In a distributed fit `batch_size` counts the rows of all processes together.

    Raises:
        ValueError: no column, columns of different length, no rows, `batch_size` below 1 or not divisible by the
            number of processes.
    """

    def __init__(
        self, columns: Mapping[str, Tensor | np.ndarray], *, batch_size: int, seed: int, steps: int | None = None
    ) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"columns need one common number of rows, at least 1; given {lengths}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.columns = dict(columns)
        self.num_rows = next(iter(lengths.values()))
        self.batch_size = batch_size
        self._order: tuple[int, Tensor] | None = None
        super().__init__(seed=seed, steps=steps or max(1, self.num_rows // batch_size))

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size

    def batch(self, index: int) -> Batch:
        rows = _own_share(self.rows(index))
        return {name: take_rows(column, rows) for name, column in self.columns.items()}

    def rows(self, index: int) -> Tensor:
        """Row numbers (batch_size,) int64 of batch number `index`."""
        first = index * self.batch_size
        parts = []
        while first < (index + 1) * self.batch_size:
            number, offset = divmod(first, self.num_rows)
            part = self._pass_order(number)[offset : offset + (index + 1) * self.batch_size - first]
            parts.append(part)
            first += len(part)
        return torch.cat(parts)

    def _pass_order(self, number: int) -> Tensor:
        if self._order is None or self._order[0] != number:
            self._order = (number, order_of_pass(self.num_rows, seed=self.seed, number=number))
        return self._order[1]


class TokenBatches(RowBatches):
    """Batches `{"input_ids": (batch_size, C) int64}` from token blocks (N, C) of any integer dtype."""

    def __init__(self, blocks_NC: Tensor | np.ndarray, *, batch_size: int, seed: int, steps: int | None = None) -> None:
        if blocks_NC.ndim != 2:
            raise ValueError(f"token blocks need shape (rows, context); given {tuple(blocks_NC.shape)}")
        super().__init__({"input_ids": blocks_NC}, batch_size=batch_size, seed=seed, steps=steps)

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * int(self.columns["input_ids"].shape[1])

    def batch(self, index: int) -> Batch:
        return {name: rows.long() for name, rows in super().batch(index).items()}


def order_of_pass(num_rows: int, *, seed: int, number: int) -> Tensor:
    """Permutation (num_rows,) int64 in which pass `number` (from 0) visits the rows."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(num_rows, generator=generator)


def take_rows(column: Tensor | np.ndarray, rows: Tensor) -> Tensor:
    """The rows of those numbers, (num_rows,) int64, in that order; unsigned integers wider than a byte as int64."""
    if isinstance(column, Tensor):
        return column[rows.to(column.device)]
    taken = column[rows.numpy()]
    # torch has few operations on unsigned integers wider than a byte.
    return torch.from_numpy(taken.astype(np.int64) if taken.dtype.kind == "u" and taken.itemsize > 1 else taken)


def _own_share(rows: Tensor) -> Tensor:
    """Every process takes each world-th row, so that all together train on exactly the batch one process would."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    world, rank = distributed.get_world_size(), distributed.get_rank()
    if len(rows) % world:
        raise ValueError(f"batch_size={len(rows)} is not divisible by the {world} processes; use a multiple of {world}")
    return rows[rank::world]
