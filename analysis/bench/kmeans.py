"""Balanced k-means: the fast solver's inertia beside the published one's, and its time and memory at Llama-7B size.

Run `python analysis/bench/kmeans.py` (some ten minutes on 2 cores). Inertia is the sum of squared distances of unit
rows to their block's mean; less is better. Rows come in two kinds: gaussian (no structure at all) and lumpy (four times
fewer directions than blocks, their popularity falling as 1/rank, so that balance has to work against the data).
"""

import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from moesaic.sparse.kmeans import BalancedClusters, balanced_kmeans, constrained_kmeans, inertia, unit_rows

COMPARED = ((1024, 256, 4), (1024, 256, 32), (1024, 256, 128), (3072, 768, 96))  # neurons, model dim, blocks
LARGE = (11008, 4096, 344)
KINDS = ("gaussian", "lumpy")


def rows(kind: str, width: int, dim: int, num_blocks: int) -> Tensor:
    """(F, D) unit rows of `kind`, the same on every call."""
    generator = Generator().manual_seed(0)
    noise_FD = torch.randn(width, dim, generator=generator)
    if kind == "gaussian":
        return unit_rows(noise_FD)
    popularity = 1.0 / torch.arange(1, max(2, num_blocks // 4) + 1)
    direction_F = torch.multinomial(popularity, width, replacement=True, generator=generator)
    centre_CD = torch.randn(len(popularity), dim, generator=generator)
    return unit_rows(noise_FD.add_(centre_CD[direction_F]))


def timed(solve: Callable[..., BalancedClusters], row_FD: Tensor, num_blocks: int) -> tuple[BalancedClusters, float]:
    """The clusters that one seeded call finds, and its seconds."""
    start = time.perf_counter()
    found = solve(row_FD, num_blocks, generator=Generator().manual_seed(0))
    return found, time.perf_counter() - start


def compare(kind: str, width: int, dim: int, num_blocks: int) -> str:
    """One line: both solvers and a random cut on the same rows."""
    row_FD = rows(kind, width, dim, num_blocks)
    fast, fast_s = timed(balanced_kmeans, row_FD, num_blocks)
    exact, exact_s = timed(constrained_kmeans, row_FD, num_blocks)
    random = inertia(row_FD, torch.randperm(width, generator=Generator().manual_seed(0)) % num_blocks, num_blocks)
    return (
        f"{kind:9} F={width:5} D={dim:4} B={num_blocks:3}  inertia: fast {fast.inertia:8.2f}  "
        f"exact {exact.inertia:8.2f}  random {random:8.2f}  fast/exact {fast.inertia / exact.inertia:.4f}  "
        f"seconds: fast {fast_s:5.1f}  exact {exact_s:5.1f}"
    )


def large(kind: str) -> str:
    """One line: the fast solver at Llama-7B size, with the peak memory of this process, rows included."""
    width, dim, num_blocks = LARGE
    row_FD = rows(kind, width, dim, num_blocks)
    fast, fast_s = timed(balanced_kmeans, row_FD, num_blocks)
    random = inertia(row_FD, torch.randperm(width, generator=Generator().manual_seed(0)) % num_blocks, num_blocks)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{kind:9} F={width} D={dim} B={num_blocks}  inertia: fast {fast.inertia:.2f}  random {random:.2f}  "
        f"rounds {len(fast.inertia_per_round)}  seconds {fast_s:.1f}  peak RSS {peak_gib:.2f} GiB"
    )


def main() -> None:
    """Print all lines, each large one from a process of its own."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for kind in KINDS:
        for size in COMPARED:
            print(compare(kind, *size), flush=True)
    for kind in KINDS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(large, (kind,)), flush=True)


if __name__ == "__main__":
    main()
