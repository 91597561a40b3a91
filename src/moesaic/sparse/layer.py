"""The sparse FFN: score, selection, combination and executor around one set of experts.

Shapes: T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.sparse.combine import CombineModule
from moesaic.sparse.executors import AUTO, EXECUTORS, check_executor, choose_executor
from moesaic.sparse.experts import Experts
from moesaic.sparse.precision import full_precision
from moesaic.sparse.routing import Routing
from moesaic.sparse.score import JointScoreModule, ScoreModule
from moesaic.sparse.select import RoutingContext, Selection

__all__ = ["RoutingRecord", "SparseFFN", "kept_selections", "set_budget", "set_executor", "sparse_layers"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingRecord:
    """What one forward of one layer decided, gradients attached.

    `logits_TB` and `score_TB` (float32) are None where the layer has no score. `executor` is what really ran; `slice`
    is a static width computed as a dense FFN. `notes` are the figures that the selection noted.
    """

    routing: Routing
    logits_TB: Tensor | None
    score_TB: Tensor | None
    executor: str
    notes: dict[str, Tensor] = field(default_factory=dict)


class RoutingTap(nn.Module):
    """Where forward hooks see each `RoutingRecord` of a layer: as a function, so that nothing is made without hooks."""

    def forward(self, record: Callable[[], RoutingRecord]) -> None:
        """Nothing: the hooks do the work."""

    @property
    def is_observed(self) -> bool:
        """Whether any hook is there."""
        return bool(self._forward_hooks)


class SparseFFN(nn.Module):
    """Maps (..., D) to (..., D) like the dense FFN it replaces.

    `score` may be None where the selection is static and the combination weighs with 1. A token without any block gets
    exactly 0, bias included, or the fill plus the bias where the combination has a fill. `executor` is a name in
    `EXECUTORS`, or `auto`: the fastest for the size at hand, and a plain slice where the routing is static. In training
    the output is dropped out as in the dense FFN. `select`, `score`, `combine` and `executor` may be exchanged later.
    Raises ValueError for parts that do not fit together.
    """

    def __init__(
        self,
        experts: Experts,
        score: ScoreModule | None,
        select: Selection,
        combine: CombineModule,
        executor: str = AUTO,
    ) -> None:
        super().__init__()
        select.check(experts.num_blocks)
        if score is None and (select.static_blocks(experts.num_blocks) is None or combine.uses_score):
            raise ValueError(f"{type(select).__name__} with {combine.config} needs a score, but score is None.")
        self.experts = experts
        self.score = score
        self.select_state: nn.Module | None = None
        self._select = select
        self.select = select
        self.combine = combine
        self.executor = check_executor(executor)
        self.tap = RoutingTap()

    @property
    def select(self) -> Selection:
        """The selection; one of another class takes a new `select_state`, one of the same class goes on with it."""
        return self._select

    @select.setter
    def select(self, rule: Selection) -> None:
        if type(rule) is not type(self._select) or self.select_state is None:
            kept = rule.state(self.experts.num_blocks)
            self.select_state = None if kept is None else kept.to(self.experts.up_BSD.device)
        self._select = rule

    @property
    def static_blocks(self) -> int | None:
        """k where this layer runs blocks 0..k-1 for every token whatever the scores; else None."""
        return self.select.resolved(self.select_state).static_blocks(self.experts.num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The sparse FFN's output, shape (..., D) like `x`, in the dtype that the dense FFN would return.

        The last dimension but one of `x` runs over the tokens of a sequence, those before it over sequences.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        width = self._plain_width()
        y_TD = self._routed(x_TD, num_sequences(x)) if width is None else self._sliced(x_TD, width)
        return F.dropout(y_TD, self.experts.dropout, self.training).view(x.shape)

    def route(self, x_TD: Tensor, *, num_sequences: int = 1) -> tuple[Routing, Tensor | None]:
        """The routing of FFN inputs, weights included, and the float32 scores (T, B) (None without a score module)."""
        record = self._decide(x_TD, num_sequences)
        return record.routing, record.score_TB

    def extra_repr(self) -> str:
        """Selection and executor for `print(model)`."""
        return f"select={self.select}, executor={self.executor}"

    def _routed(self, x_TD: Tensor, num_sequences: int) -> Tensor:
        record = self._decide(x_TD, num_sequences)
        self.tap(lambda: record)
        y_TD = EXECUTORS[record.executor](x_TD, self.experts, record.routing)
        return self._with_constants(y_TD, record.routing)

    def _sliced(self, x_TD: Tensor, width: int) -> Tensor:
        self.tap(lambda: self._decide(x_TD))
        rows = self.experts.rows(0, width)
        y_TD = self.experts.project(self.experts.hidden(x_TD, rows), rows)
        bias_D = self.experts.down_bias_D
        return y_TD if bias_D is None or not width else y_TD + bias_D.to(y_TD.dtype)

    def _decide(self, x_TD: Tensor, num_sequences: int = 1) -> RoutingRecord:
        logits_TB, score_TB = None, None
        context = RoutingContext(
            num_blocks=self.experts.num_blocks,
            dim=self.experts.dim,
            training=self.training,
            num_sequences=num_sequences,
            state=self.select_state,
            observed=self.tap.is_observed,
        )
        with full_precision(x_TD.device):
            if self.score is None:
                no_score_TB = x_TD.new_zeros(x_TD.shape[0], self.experts.num_blocks, dtype=torch.float32)
                routing = self.combine(self.select(no_score_TB, context), no_score_TB)
            elif isinstance(self.score, JointScoreModule):
                routing, logits_TB = self.score.route(x_TD, self.experts, self.select, context)
                score_TB = self.score.activate(logits_TB)
                routing = self.combine(routing, score_TB)
            else:
                logits_TB = self.score(x_TD, self.experts)
                score_TB = self.score.activate(logits_TB)
                routing = self.combine(self.select(score_TB, context), score_TB)
        return RoutingRecord(
            routing=routing,
            logits_TB=logits_TB,
            score_TB=score_TB,
            executor=self._executor_for(x_TD, routing),
            notes=context.notes,
        )

    def _executor_for(self, x_TD: Tensor, routing: Routing) -> str:
        if self._lists_idle_blocks:
            if self.executor not in (AUTO, "masked"):
                raise ValueError(
                    f"executor={self.executor} cannot train combine.straight_through=dense, which gives idle blocks a "
                    "gradient. Use executor=auto or executor=masked."
                )
            return "masked"
        if self.executor != AUTO:
            return self.executor
        if self._plain_width() is not None:
            return "slice"
        device = x_TD.device.type
        return choose_executor(
            routing.num_tokens,
            self.experts,
            torch.is_grad_enabled(),
            num_assignments=routing.token_N.shape[0],
            dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype,
        )

    def _plain_width(self) -> int | None:
        """How many blocks run for every token with weight 1, where that is known and no executor was asked for."""
        if self.executor != AUTO or not self.combine.plain:
            return None
        return self.static_blocks

    @property
    def _lists_idle_blocks(self) -> bool:
        return self.training and self.combine.config.straight_through == "dense"

    def _with_constants(self, y_TD: Tensor, routing: Routing) -> Tensor:
        fill_TD, bias_D = self.combine.fill(routing), self.experts.down_bias_D
        if fill_TD is not None:
            y_TD = y_TD + fill_TD.to(y_TD.dtype)
            return y_TD if bias_D is None else y_TD + bias_D.to(y_TD.dtype)
        if bias_D is None:
            return y_TD
        if self.combine.config.fill == "bias":
            return y_TD + bias_D.to(y_TD.dtype)
        some_T = routing.weight_TB().ne(0).any(1) if self._lists_idle_blocks else routing.count_T() > 0
        return y_TD + some_T[:, None].to(y_TD.dtype) * bias_D.to(y_TD.dtype)


def num_sequences(x: Tensor) -> int:
    """How many sequences hidden states (..., C, D) hold; a matrix (T, D) is one."""
    return max(1, x.shape[:-2].numel()) if x.dim() > 2 else 1


def sparse_layers(model: nn.Module) -> list[SparseFFN]:
    """The sparse FFNs of a model in module order; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


@contextmanager
def kept_selections(model: nn.Module) -> Iterator[None]:
    """On leaving the scope, the layers select as they did when it was entered, with the states they had."""
    before = [(layer, layer.select, layer.select_state) for layer in sparse_layers(model)]
    try:
        yield
    finally:
        for layer, select, state in before:
            layer.select = select
            layer.select_state = state


def set_budget(model: nn.Module, value: float | Sequence[float]) -> None:
    """Set the knob of every layer's selection: one value for all, or one per layer. ValueError if one is refused."""
    layers = sparse_layers(model)
    values = [float(value)] * len(layers) if isinstance(value, int | float) else list(value)
    if len(values) != len(layers):
        raise ValueError(f"{len(values)} budgets are given, but the model has {len(layers)} sparse layers.")
    selections = [layer.select.with_budget(budget) for layer, budget in zip(layers, values, strict=True)]
    for layer, select in zip(layers, selections, strict=True):
        select.check(layer.experts.num_blocks)
    for layer, select in zip(layers, selections, strict=True):
        layer.select = select


def set_executor(model: nn.Module, name: str) -> None:
    """Let every sparse layer compute with the executor `name` (or `auto`). ValueError for an unknown one."""
    check_executor(name)
    for layer in sparse_layers(model):
        layer.executor = name
