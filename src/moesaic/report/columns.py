"""The documented columns of the tidy table, where each comes from in `record.json`, and which of them measure quality.

One row of the table is one speed cell of one point of one experiment (a point that was not timed has one row without
speed). Columns of a lm-eval task are added as `task.<task>.<metric>`, with the unit of the metric as suffix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CELL_COLUMNS",
    "COLUMNS",
    "POINT_COLUMNS",
    "RECORD_COLUMNS",
    "Column",
    "Quality",
    "find_quality",
    "qualities",
    "task_column",
]

Kind = Literal["text", "int", "float"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the tidy table."""

    name: str
    source: str  # dotted path inside the record, the point or the speed cell; "" for a derived column
    kind: Kind
    meaning: str
    required: bool = False


def _column(name: str, source: str, kind: Kind, meaning: str, *, required: bool = False) -> Column:
    return Column(name=name, source=source, kind=kind, meaning=meaning, required=required)


RECORD_COLUMNS = (
    _column("experiment", "name", "text", "name of the record: method and hash", required=True),
    _column("identity", "identity", "text", "hash of the experiment: backbone x method x seed", required=True),
    _column(
        "configuration", "configuration", "text", "hash of the config without its seed: equal for seeds", required=True
    ),
    _column("study", "study", "text", "name under which experiments were run together"),
    _column("created_utc", "created_utc", "text", "when the record was written"),
    _column("seed", "seed", "int", "seed of the experiment", required=True),
    _column("backbone_name", "backbone.name", "text", "name of the dense model", required=True),
    _column("backbone_identity", "backbone.identity", "text", "content hash of the dense model"),
    _column("backbone_family", "backbone.family", "text", "architecture family"),
    _column("backbone_parameters", "backbone.parameters_total", "int", "parameters of the dense model"),
    _column("data_name", "data.name", "text", "corpus"),
    _column("data_fingerprint", "data.fingerprint", "text", "content hash of the corpus"),
    _column("method", "method.name", "text", "file name in conf/method", required=True),
    _column("variant", "method.variant", "text", "as_published, as_released or corrected"),
    _column("provenance", "method.provenance", "text", "published, or reconstruction"),
    _column("regime", "method.regime", "text", "post_training or from_scratch"),
    _column("num_blocks", "method.num_blocks", "int", "blocks per FFN"),
    _column("block_size", "method.block_size", "int", "neurons per block"),
    _column("adaptation_tokens", "adaptation.tokens", "int", "training tokens of the adapt stage"),
    _column("adaptation_steps", "adaptation.steps", "int", "optimizer steps of the adapt stage"),
    _column("adaptation_wall_seconds", "adaptation.wall_seconds", "float", "wall time of the adapt stage"),
)

POINT_COLUMNS = (
    _column("arm", "arm", "text", "what was evaluated: the adapted model, a control, or a dense model", required=True),
    _column("budget", "budget", "float", "value of the inference knob; empty where there is none"),
    _column("knob", "knob", "text", "name of the inference knob"),
    _column("active_ffn_frac", "active_ffn_frac", "float", "FFN neurons that ran, of all layers' neurons, 0..1"),
    _column("nats_per_token", "quality.nats_per_token", "float", "held-out loss, token-weighted, nats"),
    _column("perplexity", "quality.perplexity", "float", "exp(nats_per_token)"),
    _column("bits_per_byte", "quality.bits_per_byte", "float", "held-out loss in bits per byte of text"),
    _column("parameters_total", "cost.parameters_total", "int", "parameters stored"),
    _column("parameters_active", "cost.parameters_active", "float", "parameters one token uses"),
    _column("ffn_flops_per_token", "cost.ffn_flops_per_token", "float", "active FFN FLOPs per token, router left out"),
    _column("router_flops_per_token", "cost.router_flops_per_token", "float", "router FLOPs per token"),
    _column("model_flops_per_token", "cost.model_flops_per_token", "float", "whole-model FLOPs per token"),
    _column("dense_ffn_flops_per_token", "cost.dense_ffn_flops_per_token", "float", "FFN FLOPs per token, dense model"),
    _column("dense_model_flops_per_token", "cost.dense_model_flops_per_token", "float", "whole-model FLOPs, dense"),
    _column("failure_reason", "failure.reason", "text", "why the point has no result; empty where it has"),
    _column("failure_message", "failure.message", "text", "the error's own words"),
)

CELL_COLUMNS = (
    _column("phase", "phase", "text", "prefill (whole prompt) or decode (one token per step)", required=True),
    _column("batch_size", "batch_size", "int", "sequences per call", required=True),
    _column("tokens", "tokens", "int", "tokens of the timed call"),
    _column("context_tokens", "context", "int", "tokens already in the KV cache"),
    _column("control", "control", "text", "own routing, all_blocks or balanced"),
    _column("executor", "executor", "text", "which executor ran"),
    _column("ratio", "ratio", "float", "sparse time / dense time, interleaved; below 1 is faster than dense"),
    _column("ratio_low", "ratio_low", "float", "lower end of the 95 % interval of ratio over timing samples"),
    _column("ratio_high", "ratio_high", "float", "upper end"),
    _column("ideal_ratio", "ideal_ratio", "float", "the cost model's ratio with measured ceilings"),
    _column("captured_share_frac", "captured_share", "float", "(1 - ratio) / (1 - ideal_ratio)"),
    _column("dense_ms", "dense_ms.median", "float", "median time of the dense arm"),
    _column("dense_p10_ms", "dense_ms.p10", "float", "10th percentile of the dense arm"),
    _column("dense_p90_ms", "dense_ms.p90", "float", "90th percentile of the dense arm"),
    _column("dense_samples", "dense_ms.n", "int", "timing samples of the dense arm"),
    _column("sparse_ms", "sparse_ms.median", "float", "median time of the sparse arm"),
    _column("sparse_p10_ms", "sparse_ms.p10", "float", "10th percentile of the sparse arm"),
    _column("sparse_p90_ms", "sparse_ms.p90", "float", "90th percentile of the sparse arm"),
    _column("sparse_samples", "sparse_ms.n", "int", "timing samples of the sparse arm"),
    _column("samples_file", "samples_file", "text", "raw samples, relative to the record's folder"),
)

DERIVED_COLUMNS = (
    _column("label", "", "text", "method, with what tells it from the other configurations of that method"),
    _column("machine", "", "text", "what the times were taken on: device, threads, dtype"),
    _column("model", "", "text", "backbone, with the corpus where there are several: quality is comparable inside it"),
    _column("setting", "", "text", "model, with the machine where there are several: one front per setting and cell"),
    _column("record_dir", "", "text", "folder of the record"),
)

COLUMNS = RECORD_COLUMNS + DERIVED_COLUMNS + POINT_COLUMNS + CELL_COLUMNS

_TASK_UNITS = {"gold_nll": "_nats", "margin": "_nats", "kl_to_dense": "_nats", "agreement": "_frac"}


def task_column(task: str, metric: str) -> str:
    """Name of the column of a task's metric, with its unit: `task.next_line.acc_frac`, `task.blimp.gold_nll_nats`.

    lm-eval's filter suffix (`acc,none`) is dropped where it says nothing.
    """
    metric = metric.removesuffix(",none")
    unit = "_frac" if metric.split(",")[0].startswith("acc") else _TASK_UNITS.get(metric, "")
    return f"task.{task}.{metric}{unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A column that fronts can be drawn over, what to call it, and which way is better."""

    column: str
    name: str  # what the command line calls it
    label: str
    maximise: bool


_LANGUAGE = (
    Quality(column="perplexity", name="perplexity", label="perplexity", maximise=False),
    Quality(column="bits_per_byte", name="bits_per_byte", label="bits per byte", maximise=False),
    Quality(column="nats_per_token", name="nats_per_token", label="loss, nats per token", maximise=False),
)


def qualities(columns: Iterable[str]) -> list[Quality]:
    """Every quality among `columns`: the language-model losses first, then accuracies and gold NLL of each task."""
    names = list(columns)
    found = [quality for quality in _LANGUAGE if quality.column in names]
    return found + [quality for quality in map(_task_quality, names) if quality is not None]


def find_quality(name: str, columns: Iterable[str]) -> Quality:
    """The quality called `name`. ValueError names the nearest and all that these records have."""
    known = {quality.name: quality for quality in qualities(columns)}
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"unknown quality {name!r}{hint} These records have: {', '.join(known)}.")


def _task_quality(column: str) -> Quality | None:
    if not column.startswith("task."):
        return None
    name = column.removeprefix("task.")
    if ".acc" in name and name.endswith("_frac"):
        name = name.removesuffix("_frac")
        task, metric = name.rsplit(".", 1)
        detail = metric.removeprefix("acc").strip("_,")
        return Quality(
            column=column, name=name, label=f"{task} accuracy" + (f" ({detail})" if detail else ""), maximise=True
        )
    if name.endswith(".gold_nll_nats"):
        name = name.removesuffix("_nats")
        return Quality(
            column=column, name=name, label=f"{name.removesuffix('.gold_nll')} gold NLL, nats", maximise=False
        )
    return None
