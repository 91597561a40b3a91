"""What levels cost: the share of the full FFN's operations, or of its measured time.

Source: arXiv:2406.10260 (a look-up table of measured latency). Differs: the table says which shape it was measured on.
Shapes: L layers, E levels, D model dim, F FFN width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object

__all__ = ["LatencyTable", "expected_cost", "read_latency_table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyTable:
    """Median milliseconds `ms_X` of one FFN cut to the first `blocks_X` of its `num_blocks` equal blocks.

    `dim` D and `width` F are the whole FFN's; the rest says under which conditions it was measured. Raises ValueError
    where the columns differ in length, a time is not positive or the full width is missing.
    """

    blocks_X: tuple[int, ...]
    ms_X: tuple[float, ...]
    num_blocks: int
    dim: int
    width: int
    tokens: int
    dtype: str
    threads: int
    device: str

    def __post_init__(self) -> None:
        if len(self.blocks_X) != len(self.ms_X):
            raise ValueError(f"blocks_X has {len(self.blocks_X)} entries, but ms_X has {len(self.ms_X)}")
        if not all(ms > 0 for ms in self.ms_X):
            raise ValueError(f"ms_X={list(self.ms_X)} must be positive milliseconds")
        if self.num_blocks not in self.blocks_X:
            raise ValueError(f"blocks_X={list(self.blocks_X)} lacks the full width, num_blocks={self.num_blocks}")

    def share_E(self, levels_E: Sequence[int], *, dim: int, width: int) -> Tensor:
        """float32 (E,): the time of each level over that of the full width.

        Raises ValueError for an FFN or levels that the table does not have.
        """
        if (dim, width, levels_E[-1]) != (self.dim, self.width, self.num_blocks):
            raise ValueError(
                f"the latency table was measured on D={self.dim}, F={self.width} in {self.num_blocks} blocks, but the "
                f"model has D={dim}, F={width} in {levels_E[-1]}. Measure this shape."
            )
        known = dict(zip(self.blocks_X, self.ms_X, strict=True))
        missing = [blocks for blocks in levels_E if blocks not in known]
        if missing:
            raise ValueError(
                f"the latency table lacks levels of {missing} blocks (it has {list(known)}). Measure them."
            )
        return torch.tensor([known[blocks] / known[self.num_blocks] for blocks in levels_E])


def read_latency_table(path: Path) -> LatencyTable:
    """The table in the JSON file `path`. Raises ConfigError for a file that is missing or holds something else."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"latency_table={path} cannot be read ({error}). Make it with `python analysis/bench/level_latency.py`."
        ) from error
    return strict_object(LatencyTable, tree, str(path))


def expected_cost(prob_LE: Tensor, cost_LE: Tensor) -> Tensor:
    """0-dim: the mean cost of levels drawn with these probabilities, over that of all layers at their last level."""
    return (prob_LE * cost_LE).sum() / cost_LE[:, -1].sum()
