"""The root of the configuration: one experiment is a backbone, a corpus, a method, its training and its measuring."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moesaic.backbones.base import Backbone
from moesaic.bench.config import BenchConfig
from moesaic.data.corpus import Corpus
from moesaic.evaluate.config import EvaluateConfig
from moesaic.methods.base import Method
from moesaic.training.fit import FitConfig

__all__ = ["AdaptConfig", "MoesaicConfig", "PathsConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """Training shared by all methods: `fit` for language-model phases, the others for methods that refer to them."""

    context: int  # tokens of a training sequence
    fit: FitConfig
    router_fit: FitConfig
    relufy_fit: FitConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensConfig:
    """How much of each split is used; null is all of it."""

    train: int | None = None
    heldout: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PathsConfig:
    """Places on this machine; none of them changes a result."""

    runs: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class MoesaicConfig:
    """One experiment. Raises ValueError on construction for parts that do not fit each other."""

    backbone: Backbone
    data: Corpus
    method: Method
    adapt: AdaptConfig
    evaluate: EvaluateConfig
    bench: BenchConfig
    tokens: TokensConfig = field(default_factory=TokensConfig)
    seed: int = 0
    # What follows decides only where and whether things run.
    paths: PathsConfig = field(metadata={"identity": False})
    study: str = field(default="default", metadata={"identity": False})  # a name for experiments run together
    # Whether the model with oracle, random and all-block routing is evaluated too, which takes most of the time.
    controls: bool = field(default=True, metadata={"identity": False})
    dry_run: bool = field(default=False, metadata={"identity": False})  # list the stages, compute nothing
    keep_going: bool = field(default=True, metadata={"identity": False})  # in a multirun: go on after a failure
