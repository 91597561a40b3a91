"""record.json: one experiment (backbone x method x seed) with all its points, as every report reads it.

Units are in the names: `_ms`, `_seconds`, `_bytes`, `_flops_per_token`, `_frac` (0..1, of the whole model unless a name
says of what). Ratios are sparse over dense: below 1 is faster. Beside the record in its folder lie the per-document and
per-item tables that paired comparisons need.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object, to_plain
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.status import FailureReason

__all__ = [
    "DOCUMENTS_FILE",
    "ITEMS_FILE",
    "RECORD_FILE",
    "SCHEMA_VERSION",
    "Adaptation",
    "Arm",
    "BackboneInfo",
    "Cost",
    "DataInfo",
    "Failure",
    "MethodInfo",
    "Point",
    "Quality",
    "Quantiles",
    "Record",
    "RoutingUse",
    "Speed",
    "StageUse",
    "TaskScore",
    "read_record",
    "write_record",
]

SCHEMA_VERSION = 1
RECORD_FILE = "record.json"
DOCUMENTS_FILE = "documents.parquet"  # arm, budget, document, nll (nats), tokens, bytes, window_nll, window_tokens
ITEMS_FILE = "items.parquet"  # arm, budget, task, item, gold, option_loglik

Arm = Literal["adapted", "learned_router", "oracle_router", "random_router", "all_blocks", "dense", "prepared_dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """The dense model that everything started from."""

    name: str
    identity: str
    family: str
    parameters_total: int
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInfo:
    """The corpus, known by its content."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInfo:
    """The method; blocks and knob are None for those that have none."""

    name: str
    variant: str
    provenance: str
    regime: Literal["post_training", "from_scratch"]
    num_blocks: int | None = None
    block_size: int | None = None
    knob: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageUse:
    """What one stage cost, over all its restarts. `cached`: it was there before this experiment asked for it."""

    stage: str
    identity: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """What training took, the preparation of the dense model included; all zero where nothing was trained.

    `phases` are the facts that each phase reported, with its name and the budget it ran for (null: for all of them).
    """

    tokens: int = 0
    steps: int = 0
    wall_seconds: float = 0.0
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One lm-eval task, or a classifier's own.

    `acc` and `agreement` are 0..1; `gold_nll`, `margin` and `kl_to_dense` are in nats.
    """

    items: int
    acc: float | None = None
    acc_pmi: float | None = None
    gold_nll: float | None = None
    margin: float | None = None
    kl_to_dense: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        _check_fractions(self, "acc", "acc_pmi", "agreement")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How good the model is, under the record's protocol."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float | None  # None where no document was scored whole
    tasks: dict[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost model's counts for one token of this point's real routing, and the dense model's beside them."""

    parameters_total: int
    parameters_active: float
    ffn_flops_per_token: float
    router_flops_per_token: float
    model_flops_per_token: float
    dense_ffn_flops_per_token: float
    dense_model_flops_per_token: float
    # Weights and cache that one token alone has to read.
    ffn_bytes_per_token: float | None = None
    router_bytes_per_token: float | None = None
    model_bytes_per_token: float | None = None
    dense_ffn_bytes_per_token: float | None = None
    dense_model_bytes_per_token: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """Milliseconds: the median and the middle 80 % of `n` samples."""

    median: float
    p10: float
    p90: float
    n: int

    def __post_init__(self) -> None:
        if not self.p10 <= self.median <= self.p90:
            raise ValueError(f"median={self.median} lies outside p10={self.p10} .. p90={self.p90}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One timing: dense and sparse interleaved, their ratio with its interval, and the ideal ratio beside it.

    `tokens` is the prompt's length (prefill) or the number generated (decode); `context` is what lies in the KV cache
    when decoding starts. `control`: whose routing ran, the model's own, all blocks, or forced balance. `beats_ideal`:
    the whole interval is better than the ideal, which needs explaining; what the dense arm reached stands beside it.
    `active_block_frac` is of all (token, block) pairs of one call, `union_block_frac` of all blocks.
    """

    phase: Literal["prefill", "decode"]
    batch_size: int
    tokens: int
    context: int
    dense_ms: Quantiles
    sparse_ms: Quantiles
    ratio: float
    ratio_low: float
    ratio_high: float
    ideal_ratio: float | None
    captured_share: float | None
    executor: str
    control: Literal["own", "all_blocks", "balanced"]
    samples_file: str | None = None
    beats_ideal: bool = False
    dense_gb_per_s: float | None = None
    dense_tflop_per_s: float | None = None
    active_block_frac: float | None = None
    union_block_frac: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio_low <= self.ratio <= self.ratio_high:
            raise ValueError(f"ratio={self.ratio} lies outside its interval {self.ratio_low} .. {self.ratio_high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingUse:
    """Assignments per layer and block over the evaluated tokens, and the share of FFN neurons that ran per layer.

    `notes_L` are figures that the selection noted, by name (a capacity, a kept share): per layer, the mean over tokens.
    """

    counts_LB: list[list[int]]
    active_frac_L: list[float]
    notes_L: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.counts_LB) != len(self.active_frac_L):
            raise ValueError(f"counts_LB has {len(self.counts_LB)} layers, active_frac_L has {len(self.active_frac_L)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a point has no numbers."""

    reason: FailureReason | Literal["refused", "mismatch", "skipped"]
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One arm at one budget. What could not be measured is None, and `failure` says why.

    `cett` is by allowed increase of perplexity in %: the share of FFN neurons that could be left out, and the increase
    that was measured then (see `evaluate.cett`).
    """

    arm: Arm
    budget: float | None
    knob: str | None
    active_ffn_frac: float | None = None
    quality: Quality | None = None
    cost: Cost | None = None
    speed: list[Speed] = field(default_factory=list)
    routing: RoutingUse | None = None
    cett: dict[str, dict[str, float]] = field(default_factory=dict)
    failure: Failure | None = None

    def __post_init__(self) -> None:
        _check_fractions(self, "active_ffn_frac")
        if self.failure is None and self.quality is None:
            raise ValueError(f"failure is null, but arm {self.arm!r} at budget {self.budget} has no quality either")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One experiment. `config` and `protocol` hold plain trees: what was asked for and how quality was measured."""

    schema_version: int = SCHEMA_VERSION
    identity: str
    configuration: str  # identity of the config without its seed: equal for the seeds of one thing
    name: str
    study: str
    created_utc: str
    state: Literal["done", "failed"]
    seed: int
    backbone: BackboneInfo
    data: DataInfo
    method: MethodInfo
    protocol: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: list[StageUse]
    adaptation: Adaptation
    points: list[Point]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version} is not {SCHEMA_VERSION}, which this moesaic reads")
        seen = [(point.arm, point.budget) for point in self.points]
        twice = next((pair for pair in seen if seen.count(pair) > 1), None)
        if twice is not None:
            raise ValueError(f"points has arm {twice[0]!r} at budget {twice[1]} twice")


def write_record(folder: Path, record: Record) -> Path:
    """Write `record` into `folder` in one step and return its path. Raises: ValueError for NaN or an infinity."""
    path = folder / RECORD_FILE
    write_json_atomic(path, to_plain(record, Record))
    return path


def read_record(folder: Path) -> Record:
    """Return the record in `folder`. Raises: ConfigError that names the file where it is missing or does not fit."""
    path = folder / RECORD_FILE
    try:
        return strict_object(Record, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no record: {error}") from error


def _check_fractions(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is no fraction (allowed: 0..1)")
