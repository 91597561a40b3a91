"""Training routers of elastic widths: levels drawn with gradient, a cost to aim at, and where trained routers go.

The rules and routers themselves are `sparse.elastic`; the phases that use this are `methods.flextron`.
Source: NVIDIA/Megatron-LM `megatron/elastification/` @0894912..@115f5b5 (sampling, cost target, shared first layer).
Shapes: L layers, E levels, T tokens, K trained budgets, U hidden width of a router, X rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.config.identity import identity
from moesaic.methods.base import AdaptJob, Phase
from moesaic.methods.lm import router_parameters
from moesaic.sparse.elastic import (
    BudgetRouter,
    ElasticRule,
    LevelMixture,
    Mix,
    StaticLevels,
    budget_code,
    gumbel_noise,
    gumbel_softmax,
    level_logits,
)
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.level_cost import expected_cost, read_latency_table
from moesaic.sparse.levels import level_blocks, level_shares
from moesaic.sparse.select import Selection
from moesaic.sparse.trace import record_routing
from moesaic.training.fit import FitConfig, part_of

__all__ = [
    "CostTarget",
    "LevelSampling",
    "RoutedObjective",
    "RoutedPhase",
    "StaticRouter",
    "elastic_rule",
    "set_selections",
    "step_generator",
]

_INIT_STD = 0.1  # of the static router's weights, as in the descendant


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSampling:
    """How level probabilities are drawn in training: softmax((scale z + Gumbel noise) / temperature).

    The temperature is `tau * tau_decay ** step`; the scale of the logits rises linearly from 1 to `final_scale`.
    `hard_prob`: with this probability a step takes the winning prefix, times its probability, instead of its mixture.
    Raises ValueError for numbers out of range.
    """

    tau: float = 1.0
    tau_decay: float = 0.99
    final_scale: float = 10.0
    hard_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.tau <= 0 or not 0 < self.tau_decay <= 1 or self.final_scale < 1:
            raise ValueError(
                f"tau={self.tau} must be positive, tau_decay={self.tau_decay} within 0..1 (0 excluded) and "
                f"final_scale={self.final_scale} at least 1"
            )
        if not 0 <= self.hard_prob <= 1:
            raise ValueError(f"hard_prob={self.hard_prob} must be within 0..1")

    def probabilities(self, logits_XE: Tensor, step: int, steps: int, generator: Generator) -> Tensor:
        """float32 (X, E): a sample at optimizer step `step` (from 0) of `steps`, one per row."""
        scale = 1 + (self.final_scale - 1) * step / max(1, steps - 1)
        noise_XE = gumbel_noise(logits_XE.shape, generator).to(logits_XE.device)
        return gumbel_softmax(scale * logits_XE, noise_XE, max(1e-4, self.tau * self.tau_decay**step))


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTarget:
    """How far the expected cost of the drawn levels is from the budget, in the loss.

    `gap`: relative |cost / budget - 1| or absolute |cost - budget|, times `weight`. Cost is the share of the full FFNs:
    of their multiplications, or of their time by `latency_table` (made by `analysis/bench/level_latency.py`).
    `dead_band`: a gap below it counts as 0, but for the full budget. `full_weight`: at the full budget, the weight of
    the mean squared distance of the probabilities to the last level. Raises ValueError for negative numbers.
    """

    gap: Literal["relative", "absolute"]
    weight: float = 1.0
    dead_band: float = 0.0
    full_weight: float = 0.0
    latency_table: Path | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "dead_band", "full_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def cost_LE(self, layers: Sequence[SparseFFN], rule: ElasticRule) -> Tensor:
        """float32 (L, E): the cost of each level of each layer, the last level's being 1."""
        table = None if self.latency_table is None else read_latency_table(self.latency_table)
        rows = []
        for layer in layers:
            levels_E = level_blocks(rule.levels, layer.experts.num_blocks)
            dim, width = layer.experts.dim, layer.experts.num_blocks * layer.experts.block_size
            rows.append(level_shares(levels_E) if table is None else table.share_E(levels_E, dim=dim, width=width))
        return torch.stack(rows)

    def loss(self, cost: Tensor, budget: float, prob_LE: Tensor) -> Tensor:
        """The weighted gap, a 0-dim tensor."""
        gap = (cost / budget - 1).abs() if self.gap == "relative" else (cost - budget).abs()
        if budget < 1:
            return self.weight * torch.where(gap < self.dead_band, 0.0, gap)
        last_E = F.one_hot(torch.tensor(prob_LE.shape[1] - 1), prob_LE.shape[1]).to(prob_LE)
        return self.weight * gap + self.full_weight * F.mse_loss(prob_LE, last_E.expand_as(prob_LE))

    def content(self) -> str | None:
        """What the latency table says, for a stage's identity."""
        return None if self.latency_table is None else identity(read_latency_table(self.latency_table))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedPhase(Phase):
    """What the phases that train routers share: sampling, the cost they aim at, the routers' own learning rate."""

    fit: FitConfig
    router_lr: float
    cost: CostTarget
    sampling: LevelSampling = field(default_factory=LevelSampling)
    span_frac: tuple[float, float] = (0.0, 1.0)  # from where to where in `fit` this phase goes, as shares of its steps

    def __post_init__(self) -> None:
        part_of(self.fit, self.span_frac)
        if self.router_lr <= 0:
            raise ValueError(f"router_lr={self.router_lr} must be positive")

    def content(self) -> str | None:
        return self.cost.content()


class RoutedObjective(pl.LightningModule):
    """A model whose layers mix their levels by sampled probabilities, with gradient.

    Static routers train here, W1 shared, and are written to the layers' states at the end; token routers are the
    layers' scores. Raises ValueError for a model that does not select by budget.
    """

    cost_LE: Tensor

    def __init__(self, job: AdaptJob, phase: RoutedPhase, config: FitConfig) -> None:
        super().__init__()
        self.model: PreTrainedModel = job.model
        self.config, self.seed = config, job.seed
        self.layers = sparse_layers(job.model)
        self.rule = elastic_rule(job.model)
        self.sampling, self.cost = phase.sampling, phase.cost
        self.router_lr = phase.router_lr
        self.register_buffer("cost_LE", phase.cost.cost_LE(self.layers, self.rule), persistent=False)
        self.router: StaticRouter | None = None
        if isinstance(self.rule, StaticLevels):
            self.router = StaticRouter.of(self.layers, seed=job.seed)
        else:
            for parameter in router_parameters(job.model):
                parameter.requires_grad_(True)

    @abstractmethod
    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The whole loss, and its parts for the log."""

    def router_group(self) -> dict[str, Any]:
        """The routers' optimizer group: their own rate, no decay."""
        routers = router_parameters(self.model) if self.router is None else self.router.parameters()
        return {"params": list(routers), "lr": self.router_lr, "weight_decay": 0.0}

    def drawn_budget(self) -> float:
        """One of the trained budgets, by the step alone."""
        generator = step_generator(self.seed, self.global_step)
        return self.rule.trained_budgets[int(torch.randint(len(self.rule.trained_budgets), (), generator=generator))]

    def mixed(
        self, batch: dict[str, Tensor], budget: float, mix: Mix, loss_of: Callable[[dict[str, Tensor]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss under levels drawn at `budget`, and their probabilities (L, E): those of the layer, or mean ones."""
        samplers = self.samplers(budget)
        set_selections(
            self.layers,
            [
                LevelMixture(
                    levels=self.rule.levels,
                    budget=budget,
                    trained_budgets=self.rule.trained_budgets,
                    sample=sample,
                    mix=mix,
                )
                for sample in samplers
            ],
        )
        with record_routing(self.model) as trace:
            loss = loss_of(batch)
        prob_L = []
        for sample, layer_records in zip(samplers, trace.layers, strict=True):
            logits_TE = layer_records[-1].logits_TB
            if logits_TE is None:  # a static layer: one row is as good as all
                prob_L.append(sample(loss.new_zeros(1, 1))[0])
            else:
                prob_L.append(counted(sample(logits_TE), batch).mean(dim=0))
        return loss, torch.stack(prob_L)

    def samplers(self, budget: float) -> list[Callable[[Tensor], Tensor]]:
        """Per layer, what turns its logits into probabilities at this step: the same ones whenever it is called."""
        draw = partial(self.sampling.probabilities, step=self.global_step, steps=self.config.steps)
        if self.router is None:
            return [partial(self.draw_tokens, layer) for layer in range(len(self.layers))]
        logits_LE = self.router(budget_code(budget, self.rule.trained_budgets).to(self.cost_LE.device))
        prob_LE = draw(logits_LE, generator=self.noise(0))
        return [partial(repeated, prob_E) for prob_E in prob_LE]

    def draw_tokens(self, layer: int, logits_TE: Tensor) -> Tensor:
        """A sample for each token of a layer; drawn again, it is the same."""
        return self.sampling.probabilities(logits_TE, self.global_step, self.config.steps, self.noise(1 + layer))

    def noise(self, stream: int) -> Generator:
        """Noise of this step and this process."""
        return step_generator(self.seed, self.global_step, 1 + stream + 4096 * self.global_rank)

    def write_routers(self) -> dict[str, Any]:
        """Hand static routers over to the layers; the widths they give at each trained budget and halfway between."""
        if self.router is None:
            return {}
        states = [budget_router(layer) for layer in self.layers]
        for state, out_EU in zip(states, self.router.out_LEU, strict=True):
            state.fill(self.router.in_UK, out_EU)
        trained = self.rule.trained_budgets
        halfway = [(low + high) / 2 for low, high in pairwise(trained)]
        rows = []
        for budget in sorted([*trained, *halfway]):
            one_hot_LE = F.one_hot(torch.tensor([state.level(budget) for state in states]), self.cost_LE.shape[1])
            rows.append(
                {
                    "budget": budget,
                    "trained": budget in trained,
                    "cost_frac": expected_cost(one_hot_LE.float(), self.cost_LE.cpu()).item(),
                    "blocks_L": [state.blocks(budget) for state in states],
                }
            )
        return {"widths": rows}


class StaticRouter(nn.Module):
    """The static routers of all layers: z = W2 LeakyReLU(W1 u), W1 (`in_UK`) shared, W2 (`out_LEU`) their own."""

    def __init__(self, in_UK: Tensor, out_LEU: Tensor) -> None:
        super().__init__()
        self.in_UK = nn.Parameter(in_UK)
        self.out_LEU = nn.Parameter(out_LEU)

    @classmethod
    def of(cls, layers: Sequence[SparseFFN], *, seed: int) -> StaticRouter:
        """Those that the layers hold, or where they are not trained yet, normal ones with deviation 0.1."""
        states = [budget_router(layer) for layer in layers]
        if any(state.trained for state in states):
            return cls(states[0].in_UK.clone(), torch.stack([state.out_EU for state in states]))
        generator = step_generator(seed, 0, -4)
        shape_LEU = (len(states), *states[0].out_EU.shape)
        in_UK = _INIT_STD * torch.randn(states[0].in_UK.shape, generator=generator)
        return cls(in_UK, _INIT_STD * torch.randn(shape_LEU, generator=generator))

    def forward(self, code_K: Tensor) -> Tensor:
        """float32 (L, E) logits of a budget's code."""
        return level_logits(code_K, self.in_UK, self.out_LEU)


def elastic_rule(model: PreTrainedModel) -> ElasticRule:
    """The rule by which all layers select. Raises ValueError for rules that know no budget."""
    chosen = {layer.select for layer in sparse_layers(model)}
    if len(chosen) != 1 or not isinstance(rule := chosen.pop(), ElasticRule):
        raise ValueError(
            "Flextron's phases train widths by budget: method.select must be moesaic.sparse.elastic.StaticLevels or "
            "TokenLevels."
        )
    return rule


def budget_router(layer: SparseFFN) -> BudgetRouter:
    """Where `layer` keeps its static router."""
    assert isinstance(layer.select_state, BudgetRouter)
    return layer.select_state


def set_selections(layers: Sequence[SparseFFN], selections: Sequence[Selection]) -> None:
    """One selection per layer."""
    for layer, select in zip(layers, selections, strict=True):
        layer.select = select


def counted(prob_TE: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The rows of tokens that are not padding."""
    mask_NC = batch.get("attention_mask")
    return prob_TE if mask_NC is None else prob_TE[mask_NC.flatten().bool()]


def repeated(prob_E: Tensor, score_TX: Tensor) -> Tensor:
    """(T, E): one layer's probabilities for every token."""
    return prob_E.expand(score_TX.shape[0], -1)


def step_generator(seed: int, step: int, stream: int = 0) -> Generator:
    """A generator that depends on seed, step and stream alone, so that a resumed fit draws what it would have drawn."""
    key = identity([seed, step, stream])
    return Generator().manual_seed(int(key, 16))
