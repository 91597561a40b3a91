"""What this machine can do at best: bytes copied and numbers multiplied per second, for one dtype and thread count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Ceilings", "best_seconds", "measure_ceilings", "synchronise"]

MATMUL_SIZE = 1024
COPY_BYTES = (2**22, 2**28)  # smaller copies measure the call, larger ones nothing new
REPEATS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """`copy_bytes_per_s` counts bytes read plus bytes written, of a buffer of `copy_nbytes`."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    copy_nbytes: int
    dtype: str
    threads: int
    device: str


def measure_ceilings(*, nbytes: int, dtype: torch.dtype, device: torch.device) -> Ceilings:
    """The best of a few copies of a buffer as large as a model (`nbytes`, so that small models get their cache's
    bandwidth) and of a few square matrix products.
    """
    low, high = COPY_BYTES
    copied = min(max(nbytes, low), high)
    source = torch.ones(copied // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device=device)
    left = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
    product = torch.empty_like(left)
    matmul = best_seconds(lambda: torch.mm(left, left, out=product), device=device)
    return Ceilings(
        copy_bytes_per_s=2 * copied / copy,
        matmul_flops_per_s=2 * MATMUL_SIZE**3 / matmul,
        copy_nbytes=copied,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=str(device),
    )


def best_seconds(
    call: Callable[[], object],
    *,
    device: torch.device,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The shortest of `repeats` calls after one that is not counted: a ceiling is what happens undisturbed."""
    call()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = clock()
        call()
        synchronise(device)
        times.append(clock() - start)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
