"""What a method is: a conversion, the phases that train something after it, and the budgets it is judged at.

Shapes: T tokens, D model dim, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Generator
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenSplit
from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.methods.allocate import Allocation
from moesaic.methods.calibration import Calibration
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.model import convert_model
from moesaic.sparse.partition import Partition
from moesaic.sparse.score import RandomScore, Score
from moesaic.sparse.select import AllBlocks, Selection
from moesaic.sparse.stats import NeuronStats

__all__ = [
    "AdaptJob",
    "ConvertJob",
    "Method",
    "Phase",
    "Prepare",
    "SparseMethod",
    "layer_generator",
    "replace_score",
    "routed_by",
    "select_blocks",
]


@dataclass(kw_only=True, slots=True)
class ConvertJob:
    """What a conversion may use. `model` is consumed: its FFN weights move into the converted model."""

    model: PreTrainedModel
    pattern: FFNPattern | None
    calibration: Calibration | None
    budget: float | None  # set only for methods that convert once per budget
    seed: int
    share_L: list[float] | None = None  # each layer's active share, where such a method allocates its budget


@dataclass(kw_only=True, slots=True)
class AdaptJob:
    """What a training phase may use. The phase changes `model` in place; `folder` survives a crash."""

    model: PreTrainedModel
    pattern: FFNPattern | None
    calibration: Calibration | None
    tokens: TokenSplit
    context: int
    seed: int
    folder: Path
    label: str  # what a progress bar calls this


class Phase(ABC):
    """One training phase of a recipe. Subclasses are frozen dataclasses named by `_target_`."""

    __slots__ = ()
    trains_weights: ClassVar[bool] = True  # False: only routers change, so the result still shows the dense weights
    uses_selection: ClassVar[bool] = True  # False: the result is the same at every budget, so it is reused across them

    @abstractmethod
    def run(self, job: AdaptJob) -> dict[str, Any]:
        """Train `job.model` in place; resume from `job.folder` where it holds a checkpoint.

        Returns facts for the record; `tokens` counts the tokens that gave a gradient to a language-model loss.
        """

    def content(self) -> str | None:
        """What the files say that this phase names, for the stage's identity; None where it names none.

        Raises ConfigError for a file that cannot be read.
        """
        return None


class Prepare(ABC):
    """A change to the dense model itself, before anything is split (DESIGN: the `prepare` stage)."""

    __slots__ = ()

    @abstractmethod
    def run(self, job: AdaptJob) -> dict[str, Any]:
        """Change and train the dense `job.model` in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(ABC):
    """A way of making the FFNs of a dense model sparse, or one of the controls it is compared with."""

    name: str
    variant: str = "corrected"  # a column of the YAML: as_published, as_released, corrected or one of its own
    provenance: Literal["published", "reconstruction", "control"] = "published"
    budgets: tuple[float, ...] = ()  # values of the inference knob at which the model is evaluated and timed
    phases: dict[str, Phase | None] = field(default_factory=dict)  # in order; null leaves a phase out
    prepare: Prepare | None = None
    calibration_tokens: int = 0  # tokens whose FFN inputs are kept for `convert` and router training
    allocate: Allocation | None = None  # spreads a budget over layers; null: all layers get the same

    converts: ClassVar[bool] = True
    converts_per_budget: ClassVar[bool] = False  # True: a budget is fixed when converting (a slice), not at inference

    @property
    def knob(self) -> str:
        """Name of what a budget sets; empty where there is nothing to set."""
        return ""

    @property
    def blocks(self) -> int | None:
        """Into how many blocks each FFN is cut; None where it is not."""
        return None

    def conversion(self) -> dict[str, Any]:
        """The settings that decide the converted model, beside budget and seed; others may change without a new cut."""
        return {"method": type(self).__qualname__}

    def selection_at(self, budget: float | None) -> Selection | None:
        """The selection of an inference at `budget`; None where the model has its width built in."""
        return None

    def share(self, budget: float | None) -> float | None:
        """The mean active share 0..1 that `budget` stands for, so that it can be spread; None where scores decide."""
        return None

    def probe(self, job: ConvertJob) -> tuple[PreTrainedModel, Selection]:
        """The model on which an allocation tries budgets, all blocks on, and the selection that limits a layer of it.

        `job.model` is the dense model, or the converted one of a method that converts once for all budgets.
        """
        raise ValueError(f"{self.name} has nothing to allocate: set method.allocate=null")

    def active_phases(self) -> list[tuple[str, Phase]]:
        """The phases that run, in order, with their names."""
        return [(name, phase) for name, phase in self.phases.items() if phase is not None]

    def tied_to_budget(self, phase: Phase) -> bool:
        """Whether `phase` runs once per budget rather than once for all."""
        return self.converts_per_budget

    @abstractmethod
    def convert(self, job: ConvertJob) -> PreTrainedModel:
        """The converted model. Raises ValueError where model and method do not fit."""

    def check_width(self, width: int) -> None:  # noqa: B027  (most controls cut nothing)
        """Refuse, before any work, an FFN width that this method cannot cut. Raises ValueError."""

    def for_width(self, width: int) -> Self:
        """The same method with its number of blocks decided for FFNs of `width` neurons."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseMethod(Method):
    """A method that is a composition of the four choices, plus a recipe.

    Raises ValueError on construction for relations that cannot hold (k above the number of blocks, a budget that the
    selection refuses). Source: arXiv:2310.10837 sec. 2 (every method as a sum over active neurons).
    """

    partition: Partition
    score: Score | None  # null where the selection needs none: learned static widths
    select: Selection
    combine: Combine
    oracle: Score  # the upper bound that the `oracle_router` control uses
    random: Score = field(default_factory=RandomScore)  # what knows nothing, for the `random_router` control
    adapt_each_budget: bool  # True: phases that see the selection run once per budget; False: once, at `select`
    executor: str = "auto"

    @property
    def knob(self) -> str:
        return self.select.knob

    def tied_to_budget(self, phase: Phase) -> bool:
        return self.adapt_each_budget and phase.uses_selection

    @property
    def blocks(self) -> int:
        return self.partition.num_blocks

    def conversion(self) -> dict[str, Any]:
        parts = {"partition": self.partition, "score": self.score, "combine": self.combine}
        return {**parts, "executor": self.executor}

    def selection_at(self, budget: float | None) -> Selection:
        return self.select if budget is None else self.select.with_budget(budget)

    def selections_at(self, budget: float | None, share_L: Sequence[float] | None) -> Selection | list[Selection]:
        """The selection of an inference at `budget`, or one per layer where an allocation gave each its share."""
        select = self.selection_at(budget)
        return select if share_L is None else [select.with_share(share, self.blocks) for share in share_L]

    def share(self, budget: float | None) -> float | None:
        return self.selection_at(budget).share(self.blocks)

    def probe(self, job: ConvertJob) -> tuple[PreTrainedModel, Selection]:
        replace_score(job.model, self.oracle, job.seed)
        return job.model, self.select

    def __post_init__(self) -> None:
        num_blocks = self.partition.num_blocks
        for selection in (self.select, *(self.select.with_budget(budget) for budget in self.budgets)):
            if num_blocks:  # otherwise `for_width` decides it, and checks again
                selection.check(num_blocks)
        wanted = self.select.num_scores(num_blocks)
        for name, score in (("score", self.score), ("oracle", self.oracle), ("random", self.random)):
            if score is not None and score.num_scores(num_blocks) != wanted:
                raise ValueError(
                    f"{name} gives {score.num_scores(num_blocks)} scores a token, but select="
                    f"{type(self.select).__name__} wants {wanted}. Make the two fit."
                )
        if self.select.adaptive and not self.calibration_tokens:
            raise ValueError(
                f"calibration_tokens=0, but how many blocks {type(self.select).__name__} runs depends on scores: the "
                "controls are matched to it on calibration tokens. Set calibration_tokens above 0."
            )

    def check_width(self, width: int) -> None:
        self.partition.check_width(width)
        self.for_width(width)

    def for_width(self, width: int) -> Self:
        return replace(self, partition=self.partition.for_width(width))

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        """A sparse model with all blocks selected, so that it still computes the dense function."""
        layers = []
        for site in find_ffns(job.model, job.pattern):
            ffn = site.read()
            inputs_TD = job.calibration.inputs_TD(site.index) if job.calibration else None
            layers.append(self._layer(ffn, inputs_TD, layer_generator(job.seed, site.index)))
            site.release()
        return convert_model(job.model, layers, job.pattern)

    def _layer(self, ffn: DenseFFN, inputs_TD: torch.Tensor | None, generator: Generator) -> SparseFFN:
        stats = NeuronStats(ffn, inputs_TD) if inputs_TD is not None else None
        block_F = self.partition.labels(ffn, stats, generator=generator)
        experts = Experts.from_dense(ffn, block_F)
        combine = self.combine.for_ffn(ffn).build(ffn.dim, experts.num_blocks)
        score = None
        if self.score is not None:
            score = self.score.for_ffn(ffn).build(ffn.dim, experts.num_blocks)
            score.initialise(experts, inputs_TD, generator=generator)
        if inputs_TD is not None:
            combine.initialise(experts, inputs_TD)
        return SparseFFN(experts, score, AllBlocks(), combine, executor=self.executor)


def replace_score(model: PreTrainedModel, score: Score, seed: int) -> None:
    """Give every sparse layer a new, data-free score."""
    for index, layer in enumerate(sparse_layers(model)):
        built = score.build(layer.experts.dim, layer.experts.num_blocks)
        built.initialise(layer.experts, None, generator=layer_generator(seed, index))
        layer.score = built


def layer_generator(seed: int, layer: int) -> Generator:
    """A generator for one layer, so that a layer's split does not depend on how many layers came before it."""
    return torch.Generator().manual_seed(seed * 100_003 + layer)


@contextmanager
def routed_by(model: PreTrainedModel, select: Selection, combine: Combine) -> Iterator[None]:
    """Within the scope every sparse layer selects and combines otherwise: a phase with a routing of its own."""
    layers = sparse_layers(model)
    before = [(layer.select, layer.select_state, layer.combine) for layer in layers]
    for layer in layers:
        layer.select = select
        layer.combine = combine.build(layer.experts.dim, layer.experts.num_blocks).to(layer.experts.up_BSD.device)
    try:
        yield
    finally:
        for layer, (selection, state, combination) in zip(layers, before, strict=True):
            layer.select, layer.combine = selection, combination
            layer.select_state = state


def select_blocks(model: PreTrainedModel, selection: Selection | Sequence[Selection]) -> None:
    """Give every sparse layer of `model` its selection: one for all, or one per layer."""
    layers = sparse_layers(model)
    selections = [selection] * len(layers) if isinstance(selection, Selection) else list(selection)
    for layer, chosen in zip(layers, selections, strict=True):
        layer.select = chosen
