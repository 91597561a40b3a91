"""The stages of one experiment and the points it is judged at. Building a plan computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from moesaic.app import stages
from moesaic.app.schema import MoesaicConfig
from moesaic.backbones.classifier import Classifier
from moesaic.backbones.pretrain import PretrainHere
from moesaic.config.identity import identity
from moesaic.data.corpus import Split
from moesaic.methods.base import Method, Phase, SparseMethod
from moesaic.methods.controls import Arm
from moesaic.runs.stage import Stage

__all__ = ["Plan", "Point"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One row of the record: a model, at a budget, with its own or a control's routing."""

    arm: Arm
    budget: float | None
    model: Stage
    timed: bool


class Plan:
    """All stages of the experiment `config`, each built once."""

    def __init__(self, config: MoesaicConfig) -> None:
        self.config = config
        self.method: Method = config.method

    @cached_property
    def tokenizer(self) -> Stage | None:
        """What holds the tokenizer where the backbone is trained here: one of the corpus, or a given encoder's own."""
        backbone = self.config.backbone
        start = backbone.encoder if isinstance(backbone, Classifier) else backbone
        if isinstance(start, PretrainHere):
            return stages.train_tokenizer(self.config.data, start)
        return None if start is backbone else stages.fetch_backbone(start)

    @cache  # noqa: B019  (a plan lives as long as its experiment)
    def tokens(self, split: Split) -> Stage:
        """The corpus split as token ids of this backbone's tokenizer."""
        limit = self.config.tokens.train if split == "train" else self.config.tokens.heldout
        return stages.tokenise_split(self.config.data, split, self.tokenizer or self.backbone, limit)

    @cached_property
    def backbone(self) -> Stage:
        """The dense model every number is compared with."""
        if self.tokenizer is None:
            return stages.fetch_backbone(self.config.backbone)
        return stages.pretrain_backbone(self.config.backbone, self.tokenizer, self.tokens("train"))

    @cached_property
    def prepared(self) -> Stage:
        """The dense model that is converted: the backbone, or what the method's `prepare` made of it."""
        if self.method.prepare is None:
            return self.backbone
        return stages.prepare(self.config, self.backbone, self.tokens("train"))

    @cached_property
    def calibration(self) -> Stage | None:
        """Cached FFN inputs of the prepared dense model, where the method asks for them."""
        if not self.method.calibration_tokens:
            return None
        return stages.run_calibration(self.config, self.prepared, self.tokens("train"))

    @cache  # noqa: B019
    def converted(self, budget: float | None) -> Stage:
        """The model after the cut; only methods that cut to a budget have one for each."""
        if not self.method.converts:
            return self.prepared
        if not self.method.converts_per_budget:
            return stages.convert(self.config, self.prepared, self.calibration, None)
        return stages.convert(self.config, self.prepared, self.calibration, budget, self.allocation(budget))

    @cache  # noqa: B019
    def allocation(self, budget: float | None) -> Stage | None:
        """Each layer's share of `budget`, where the method does not give all layers the same."""
        if self.method.allocate is None or budget is None:
            return None
        assert self.calibration is not None
        whole = self.prepared if self.method.converts_per_budget else self.converted(None)
        return stages.allocate(self.config, whole, self.calibration, budget)

    def phase_models(self, budget: float | None) -> list[tuple[Phase, Stage]]:
        """Each phase of the recipe with the model it leaves behind, in order."""
        trained: list[tuple[Phase, Stage]] = []
        model = self.converted(budget)
        for name, phase in self.method.active_phases():
            own = budget if self.method.tied_to_budget(phase) else None
            allocation = None if self.method.converts_per_budget else self.allocation(own)
            model = stages.adapt(
                self.config, name, phase, own, model, self.tokens("train"), self.calibration, allocation
            )
            trained.append((phase, model))
        return trained

    def adapted(self, budget: float | None) -> Stage:
        """The model at the end of the recipe."""
        models = self.phase_models(budget)
        return models[-1][1] if models else self.converted(budget)

    def points(self) -> Iterator[Point]:
        """What is evaluated, budget by budget; the dense reference is not repeated here."""
        if self.method.prepare is not None:
            yield Point(arm="prepared_dense", budget=None, model=self.prepared, timed=False)
        if not self.method.converts and not self.method.active_phases():
            yield Point(arm="dense", budget=None, model=self.backbone, timed=True)
            return
        for budget in self.method.budgets or (None,):
            yield Point(arm="adapted", budget=budget, model=self.adapted(budget), timed=True)
            if isinstance(self.method, SparseMethod):
                yield from self._controls(budget)

    def _controls(self, budget: float | None) -> Iterator[Point]:
        routers = [model for phase, model in self.phase_models(budget) if not phase.trains_weights]
        if routers:
            yield Point(arm="learned_router", budget=budget, model=routers[-1], timed=False)
        if not self.config.controls:
            return
        yield Point(arm="oracle_router", budget=budget, model=self.converted(budget), timed=False)
        yield Point(arm="random_router", budget=budget, model=self.converted(budget), timed=False)
        yield Point(arm="all_blocks", budget=budget, model=self.adapted(budget), timed=False)

    @cached_property
    def reference(self) -> Stage:
        """Quality of the dense backbone under the same protocol."""
        return self.evaluation(Point(arm="dense", budget=None, model=self.backbone, timed=False))

    def evaluation(self, point: Point) -> Stage:
        """Quality and cost of `point`."""
        control = point.arm in ("oracle_router", "random_router")
        matched = None
        if control and isinstance(self.method, SparseMethod) and self.method.select.adaptive:
            own = Point(arm="adapted", budget=point.budget, model=self.adapted(point.budget), timed=False)
            matched = self.evaluation(own)
        return stages.evaluate(
            self.config,
            point.arm,
            point.budget,
            point.model,
            self.tokens("heldout"),
            self.calibration if control else None,
            matched=matched,
            allocation=self._routing_allocation(point),
        )

    def timing(self, point: Point) -> Stage:
        """Speed of `point`, interleaved with the dense backbone."""
        heldout, allocation = self.tokens("heldout"), self._routing_allocation(point)
        return stages.time(self.config, point.arm, point.budget, self.backbone, point.model, heldout, allocation)

    def _routing_allocation(self, point: Point) -> Stage | None:
        """The allocation that the selections of `point` follow; a slice has its own built in."""
        return self.allocation(point.budget) if isinstance(self.method, SparseMethod) else None

    def stages_of(self, point: Point) -> list[Stage]:
        """What has to be computed for `point`."""
        return [self.evaluation(point), *([self.timing(point)] if self.is_timed(point) else [])]

    def is_timed(self, point: Point) -> bool:
        """Whether `point` has speed to measure and the experiment wants it."""
        return point.timed and bool(self.config.bench.phases)

    def leaves(self) -> list[Stage]:
        """Every stage whose output the record reads; with their parents, all there is to do."""
        return [self.reference, *(stage for point in self.points() for stage in self.stages_of(point))]

    @cached_property
    def identity(self) -> str:
        """Of the whole experiment: it changes with any stage."""
        return identity([stage.identity for stage in self.leaves()])
