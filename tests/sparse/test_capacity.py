"""Capacity rules: the bounds' closed-form values, the clips, the share of affinity, and what training remembers."""

import math
from itertools import pairwise

import pytest
import torch

from moesaic.sparse.capacity import AffinityMass, BoundCapacity, CapacityMemory, Demand, FixedCapacity, log_lower_bound

SPOT = {0.03: 0.790, 0.05: 21.05, 0.08: 6.42e4, 0.10: 1.086e8}


def demand(score_TB, top_l=1, scopes=1, dim=128):
    rank_TB = score_TB.argsort(1, descending=True).argsort(1)
    shape = (scopes, -1)
    return Demand(
        score_NCB=score_TB.unflatten(0, shape),
        chosen_NCB=(rank_TB < top_l).unflatten(0, shape),
        top_l=top_l,
        dim=dim,
    )


def random_demand(tokens=256, blocks=8, top_l=2, scopes=1, seed=0):
    score_TB = torch.randn(tokens, blocks, generator=torch.Generator().manual_seed(seed)) * 128**-0.5
    return demand(score_TB, top_l, scopes)


@pytest.mark.parametrize(("delta", "tokens"), SPOT.items())
def test_the_lower_bound_at_4096_dimensions_and_8_blocks(delta, tokens):
    assert log_lower_bound(torch.tensor(delta), 4096, 8).exp().item() == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize(("delta", "tokens"), [(0.03, 2.281), (0.05, 91.59)])
def test_the_tighter_bound(delta, tokens):
    assert log_lower_bound(torch.tensor(delta), 4096, 8, "erfc").exp().item() == pytest.approx(tokens, rel=1e-3)


def test_the_tighter_bound_is_never_smaller_and_both_are_monotone():
    delta = torch.linspace(0, 1.4, 200)
    loose, tight = (log_lower_bound(delta, 128, 8, bound) for bound in ("exp", "erfc"))
    assert (tight >= loose).all()
    assert (loose.diff() > 0).all()
    assert (tight.diff() > 0).all()


def test_the_bound_inverts():
    for capacity in (1.0, 30.0, 4000.0):
        a = math.log(8 * capacity)
        delta = math.sqrt(2 * a / (4096 + a))
        assert log_lower_bound(torch.tensor(delta, dtype=torch.float64), 4096, 8).exp().item() == pytest.approx(
            capacity
        )


def test_the_bound_is_a_switch_and_not_a_dial():
    def delta(load, tokens, dim):
        a = math.log(8 * load * tokens / 8)
        return math.sqrt(2 * a / (dim + a))

    assert [round(delta(load, 32768, 4096), 4) for load in (0.6, 1.1)] == [0.0694, 0.0715]
    assert [round(delta(load, 2048, 128), 4) for load in (0.6, 1.1)] == [0.3245, 0.3373]


@pytest.mark.parametrize("bound", ["exp", "erfc"])
@pytest.mark.parametrize("size", [0.0, 0.5, 1.4142, 2.0, 1e6])
def test_any_affinity_gives_a_finite_capacity_between_the_clips(bound, size):
    asked = demand(torch.full((80, 8), size))
    slots_NB = BoundCapacity(bound=bound).slots(asked, CapacityMemory(8), training=True)
    assert slots_NB.shape == (1, 8)
    assert ((slots_NB >= 6) & (slots_NB <= 11)).all()
    assert slots_NB[0, 0] == (6 if size == 0 else 11)


def test_at_least_one_token():
    assert BoundCapacity(lowest=0.01).slots(demand(torch.zeros(8, 8)), CapacityMemory(8), training=True).min() == 1
    assert FixedCapacity(factor=0.01).slots(demand(torch.zeros(8, 8)), CapacityMemory(8), training=True).min() == 1


def test_the_statistics_of_the_affinities():
    score_TB = torch.tensor([[0.1, 0.3], [0.2, 0.0], [0.4, 0.1], [-0.2, 0.6]])
    best = [0.3, 0.2, 0.4, 0.6]
    expected = {"max": 0.6, "mean_top1": sum(best) / 4, "quantile": 0.4}
    for stat, value in expected.items():
        rule = BoundCapacity(delta_stat=stat, quantile=0.75, lowest=1e-9, highest=1e20)
        wanted = log_lower_bound(torch.tensor(value), 128, 2) - math.log(2)
        assert rule.log_factor_B(demand(score_TB)).tolist() == pytest.approx([wanted.item()] * 2, rel=1e-5)
    per_expert = BoundCapacity(delta_stat="per_expert", lowest=1e-9, highest=1e20).log_factor_B(demand(score_TB))
    own = [log_lower_bound(torch.tensor(value), 128, 2).item() - math.log(2) for value in (0.3, 0.45)]
    assert per_expert.tolist() == pytest.approx(own, rel=1e-5)


def test_training_averages_the_log_and_inference_only_reads():
    rule, memory = BoundCapacity(lowest=0.01, highest=100.0, ema=0.75), CapacityMemory(8)
    low, high = demand(torch.full((80, 8), 0.2)), demand(torch.full((80, 8), 0.3))
    rule.slots(low, memory, training=True)
    first_B = memory.log_factor_B.clone()
    torch.testing.assert_close(first_B, rule.log_factor_B(low))
    rule.slots(high, memory, training=True)
    torch.testing.assert_close(memory.log_factor_B, 0.75 * first_B + 0.25 * rule.log_factor_B(high))
    before = memory.state_dict()
    read = rule.slots(low, memory, training=False)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
    assert read[0, 0] == math.ceil(memory.log_factor_B[0].exp().item() * 10 - 1e-4)
    longer = rule.slots(demand(torch.full((160, 8), 0.2)), memory, training=False)
    assert abs(longer[0, 0].item() - 2 * read[0, 0].item()) <= 1


def test_the_first_batch_is_frozen_by_ema_one():
    rule, memory = BoundCapacity(lowest=0.01, highest=100.0, ema=1.0), CapacityMemory(8)
    rule.slots(demand(torch.full((80, 8), 0.2)), memory, training=True)
    first_B = memory.log_factor_B.clone()
    rule.slots(demand(torch.full((80, 8), 0.3)), memory, training=True)
    assert torch.equal(memory.log_factor_B, first_B)


def test_fixed_capacity_rounds_up_the_exact_product():
    assert FixedCapacity(factor=1.1).slots(demand(torch.zeros(80, 8)), CapacityMemory(8), training=True)[0, 0] == 11
    assert FixedCapacity(factor=1.1).slots(demand(torch.zeros(72, 8)), CapacityMemory(8), training=True)[0, 0] == 10


@pytest.mark.parametrize("scopes", [1, 4])
def test_mass_against_a_loop(scopes):
    asked = random_demand(scopes=scopes)
    for rho in (0.3, 0.9):
        slots_NB = AffinityMass(rho=rho, highest=1.1).slots(asked, CapacityMemory(8), training=True)
        for n in range(scopes):
            for b in range(8):
                scores = sorted(asked.score_NCB[n, asked.chosen_NCB[n, :, b], b].clamp(min=0).tolist(), reverse=True)
                taken, total = 0, 0.0
                while taken < len(scores) and total < rho * sum(scores):
                    total += scores[taken]
                    taken += 1
                cap = math.ceil(1.1 * asked.mean_load)
                assert slots_NB[n, b] == min(max(taken, 1), cap)


def test_full_mass_keeps_every_positive_affinity_and_more_mass_keeps_more():
    asked = random_demand()
    positive_B = (asked.chosen_NCB & (asked.score_NCB > 0)).sum((0, 1))
    everything = AffinityMass(rho=1.0, highest=100.0).slots(asked, CapacityMemory(8), training=True)
    assert everything[0].tolist() == positive_B.tolist()
    capped = AffinityMass(rho=1.0, highest=0.5).slots(asked, CapacityMemory(8), training=True)
    assert capped[0].tolist() == positive_B.clamp(max=32).tolist()
    counts = [
        AffinityMass(rho=r / 20, highest=2.0).slots(asked, CapacityMemory(8), training=True) for r in range(1, 21)
    ]
    assert all((later >= earlier).all() for earlier, later in pairwise(counts))


def test_full_mass_keeps_affinities_that_rounding_would_lose():
    score_TB = torch.tensor([[1.0], [1e-30], [1e-38]])
    assert AffinityMass(rho=1.0, highest=9.0).slots(demand(score_TB), CapacityMemory(1), training=True).item() == 3


def test_without_positive_affinity_one_token_is_kept():
    asked = demand(-torch.rand(40, 4, generator=torch.Generator().manual_seed(0)))
    assert (AffinityMass(rho=0.9, highest=1.1).slots(asked, CapacityMemory(4), training=True) == 1).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedCapacity(factor=0.0), "factor=0.0 must be positive"),
        (lambda: AffinityMass(rho=1.2, highest=1.1), r"rho=1.2 is outside 0\.\.1"),
        (lambda: BoundCapacity(lowest=1.2, highest=1.1), "highest=1.1 is below lowest=1.2"),
        (lambda: BoundCapacity(ema=1.5), r"ema=1.5 is outside 0\.\.1"),
    ],
)
def test_what_makes_no_capacity_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
