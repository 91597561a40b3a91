"""Cutting the co-activation graph of the neurons into equal blocks.

Source: arXiv:2110.01786 sec. 3.2 and github.com/thunlp/MoEfication (METIS on a thresholded graph). Differs: spectral
clustering is offered beside METIS and needs no extra package; surplus neurons move by a seeded shuffle.
Shapes: F neurons, B blocks, S = F / B neurons per block, E edges in both directions.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Generator, Tensor

from moesaic.sparse.kmeans import balanced_kmeans, unit_rows

__all__ = ["even_out", "integer_edges", "metis_blocks", "spectral_blocks"]

_MAX_EDGE = 2**20  # METIS sums edge weights in a machine integer


def spectral_blocks(weight_FF: Tensor, num_blocks: int, *, generator: Generator) -> Tensor:
    """int64 (F,): balanced k-means on the row-normalised top-B eigenvectors of the degree-normalised graph.

    `weight_FF` is symmetric and >= 0; its diagonal is ignored. Takes O(F^3) time and 8 F^2 bytes, twice.
    """
    graph_FF = weight_FF.double().cpu().numpy().copy()
    np.fill_diagonal(graph_FF, 0.0)
    degree_F = graph_FF.sum(axis=1)
    # A neuron that never fires with another has degree 0; its row stays zero.
    scale_F = np.divide(1.0, np.sqrt(degree_F), out=np.zeros_like(degree_F), where=degree_F > 0)
    graph_FF *= scale_F[:, None]
    graph_FF *= scale_F[None, :]
    width = len(graph_FF)
    _, vector_FB = scipy.linalg.eigh(graph_FF, subset_by_index=(width - num_blocks, width - 1), overwrite_a=True)
    point_FB = unit_rows(torch.from_numpy(np.ascontiguousarray(vector_FB)))
    return balanced_kmeans(point_FB, num_blocks, generator=generator).block_F


def metis_blocks(weight_FF: Tensor, num_blocks: int, *, generator: Generator) -> Tensor:
    """int64 (F,): METIS k-way parts of the released integer graph, then evened out. ImportError names the extra."""
    try:
        import pymetis
    except ModuleNotFoundError as error:
        raise ImportError(
            "partition.solver=metis needs the package pymetis: install moesaic[metis], or use solver: spectral."
        ) from error
    if num_blocks == 1:
        return torch.zeros(len(weight_FF), dtype=torch.int64)
    edge_FF = integer_edges(weight_FF).numpy()
    starts = np.concatenate([[0], (edge_FF > 0).sum(axis=1).cumsum()])
    row_E, column_E = edge_FF.nonzero()
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    _, part_F = pymetis.part_graph(
        num_blocks,
        pymetis.CSRAdjacency(starts, column_E),
        eweights=edge_FF[row_E, column_E],
        recursive=False,
        options=pymetis.Options(seed=seed),
    )
    return even_out(torch.tensor(part_F), num_blocks, generator=generator)


def integer_edges(weight_FF: Tensor) -> Tensor:
    """int64 (F, F): weights over 0.99 x their first non-zero decile, truncated; below 1 and on the diagonal no edge."""
    weight_FF = weight_FF.double().cpu()
    deciles = np.quantile(weight_FF.numpy(), np.arange(1, 11) / 10)
    threshold = 0.99 * next((decile for decile in deciles if decile > 0), 1.0)
    return (weight_FF / threshold).clamp(max=_MAX_EDGE).long().fill_diagonal_(0)


def even_out(block_F: Tensor, num_blocks: int, *, generator: Generator) -> Tensor:
    """Labels with exactly F / B neurons per block: those beyond that move, at random, to blocks that have room."""
    size = len(block_F) // num_blocks
    order_F = torch.randperm(len(block_F), generator=generator)
    order_F = order_F[block_F[order_F].argsort(stable=True)]
    counts_B = torch.bincount(block_F, minlength=num_blocks)
    rank_F = torch.arange(len(block_F)) - (counts_B.cumsum(0) - counts_B)[block_F[order_F]]
    surplus = order_F[rank_F >= size]
    free = torch.arange(num_blocks).repeat_interleave((size - counts_B).clamp(min=0))
    evened_F = block_F.clone()
    evened_F[surplus] = free[torch.randperm(len(free), generator=generator)]
    return evened_F
