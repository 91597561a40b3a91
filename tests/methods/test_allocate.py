"""Allocations: the solver against every spread, greedy against its own rule, the probe against the slice."""

from __future__ import annotations

import itertools

import pytest
import torch
from methods.toy import toy_calibration, toy_conversion
from toys import tiny_model

from moesaic.ffn.sites import find_ffns
from moesaic.methods.allocate import AllocationJob, GreedyLoss, SolvedError, cheapest_counts, relative_errors
from moesaic.methods.base import ConvertJob, SparseMethod
from moesaic.methods.lm import calibration_loss
from moesaic.methods.static import StaticSlice, slice_ffn
from moesaic.sparse.combine import Combine
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.partition import Contiguous
from moesaic.sparse.score import Linear, Oracle
from moesaic.sparse.select import AllBlocks, Threshold, TopK

BLOCKS = 4


def static_probe(tmp_path, share: float) -> AllocationJob:
    method = StaticSlice(name="static_slice", num_blocks=BLOCKS, budgets=(2,), calibration_tokens=512)
    calibration = toy_calibration(tiny_model("llama"), tmp_path)
    job = ConvertJob(model=tiny_model("llama"), pattern=None, calibration=calibration, budget=None, seed=0)
    return job_of(*method.probe(job), calibration, share)


def routed_probe(tmp_path, share: float) -> AllocationJob:
    method = routed(TopK(k=2))
    _, model, calibration = toy_conversion(method, tmp_path)
    job = ConvertJob(model=model, pattern=None, calibration=calibration, budget=None, seed=0)
    return job_of(*method.probe(job), calibration, share)


def routed(select) -> SparseMethod:
    return SparseMethod(
        name="toy",
        partition=Contiguous(num_blocks=BLOCKS),
        score=Linear(),
        select=select,
        combine=Combine(),
        oracle=Oracle(target="output_norm"),
        adapt_each_budget=True,
        calibration_tokens=512,
    )


def job_of(model, select, calibration, share: float) -> AllocationJob:
    loss = lambda tokens: calibration_loss(model, calibration, tokens)  # noqa: E731
    return AllocationJob(model=model, calibration=calibration, select=select, share=share, loss=loss, label="toy")


def test_the_solved_spread_is_the_cheapest_of_all():
    cost_LK = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)).tolist()
    for total in range(4, 21):
        spreads = [s for s in itertools.product(range(1, 6), repeat=4) if sum(s) == total]
        cheapest = min(spreads, key=lambda s: sum(cost_K[k - 1] for cost_K, k in zip(cost_LK, s, strict=True)))
        assert cheapest_counts(cost_LK, total) == list(cheapest)


def test_a_limited_static_probe_is_the_slice_of_that_width(tmp_path):
    job = static_probe(tmp_path, share=0.5)
    dense = [site.read() for site in find_ffns(tiny_model("llama"))]
    for index, ffn in enumerate(dense):
        layer, x_TD = sparse_layers(job.model)[index], job.inputs_TD(index)
        torch.testing.assert_close(layer(x_TD), ffn(x_TD))
        for count in (1, 3):
            job.limit(index, count)
            sliced = slice_ffn(ffn, job.calibration.inputs_TD(index), ffn.width // BLOCKS * count)
            torch.testing.assert_close(layer(x_TD), sliced(x_TD), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("probe", [static_probe, routed_probe])
@pytest.mark.parametrize("rule", [GreedyLoss(loss_tokens=64), SolvedError()], ids=["greedy", "solved"])
def test_shares_have_the_wanted_mean_and_leave_the_probe_whole(probe, rule, tmp_path):
    job = probe(tmp_path, share=0.5)
    shares = rule.shares(job)
    assert sum(shares) / len(shares) == 0.5
    assert all(share in (0.25, 0.5, 0.75, 1.0) for share in shares)
    assert {type(layer.select) for layer in sparse_layers(job.model)} == {AllBlocks}


def test_greedy_takes_the_cheapest_block_first(tmp_path):
    job = routed_probe(tmp_path, share=1 - 1 / (BLOCKS * len(sparse_layers(tiny_probe_model(tmp_path)))))
    losses = []
    for index, layer in enumerate(sparse_layers(job.model)):
        job.limit(index, BLOCKS - 1)
        losses.append(job.loss(64))
        layer.select = AllBlocks()
    shares = GreedyLoss(loss_tokens=64).shares(job)
    assert shares.index(0.75) == losses.index(min(losses))


def tiny_probe_model(tmp_path):
    return routed_probe(tmp_path / "count", share=0.5).model


def test_errors_fall_to_nothing_when_all_blocks_run(tmp_path):
    errors = relative_errors(static_probe(tmp_path, share=0.5), 0)
    assert len(errors) == BLOCKS
    assert errors[-1] == pytest.approx(0, abs=1e-10)
    assert errors[0] > errors[-1]


def test_a_budget_below_one_block_a_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a budget of 0\.1 is 1 parts for 2 layers; each needs at least one"):
        SolvedError().shares(static_probe(tmp_path, share=0.1))


def test_which_budgets_are_shares():
    assert routed(TopK(k=2)).share(3) == 0.75
    assert routed(Threshold(tau=0.5)).share(0.5) is None
    with pytest.raises(ValueError, match=r"the budget of Threshold is no share of blocks"):
        routed(Threshold(tau=0.5)).selections_at(0.5, [0.5, 0.5])
    assert routed(TopK(k=2)).selections_at(2, [0.25, 0.75]) == [TopK(k=1), TopK(k=3)]
