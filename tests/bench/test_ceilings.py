"""Ceilings: the arithmetic on a fake clock, and that the real ones are numbers."""

import math
from itertools import accumulate, cycle

import pytest
import torch

from moesaic.bench.ceilings import COPY_BYTES, best_seconds, measure_ceilings

CPU = torch.device("cpu")


def test_the_shortest_call_counts_and_the_first_does_not() -> None:
    ticks = accumulate(cycle([0.0, 5.0, 1.0, 2.0, 1.0, 9.0]))  # pauses and calls in turns: calls take 5, 2, 9
    calls: list[int] = []
    assert best_seconds(lambda: calls.append(1), device=CPU, repeats=3, clock=lambda: next(ticks)) == 2.0
    assert len(calls) == 4


@pytest.mark.parametrize("nbytes", [1, 2**23])
def test_real_ceilings(nbytes: int) -> None:
    ceilings = measure_ceilings(nbytes=nbytes, dtype=torch.float32, device=CPU)
    assert ceilings.copy_nbytes == max(nbytes, COPY_BYTES[0])
    assert 0 < ceilings.copy_bytes_per_s < math.inf
    assert 0 < ceilings.matmul_flops_per_s < math.inf
    assert (ceilings.dtype, ceilings.device) == ("float32", "cpu")
