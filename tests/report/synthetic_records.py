"""SYNTHETIC records for tests of the report: plausible shapes, invented numbers. Nothing here was measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moesaic.report.load import without_seeds

DENSE_NATS = 2.0
NUM_BLOCKS = 32
CELLS = (("prefill", 1, 512, 0), ("prefill", 8, 512, 0), ("decode", 1, 32, 128), ("decode", 8, 32, 128))

# method -> (loss at 25 % active over dense in nats for each arm, how much of the ideal gain it captures)
_ARMS = {
    "moefication": ({"oracle_router": 0.06, "learned_router": 0.35, "adapted": 0.14, "random_router": 2.4}, 0.8),
    "factorllm": ({"oracle_router": 0.30, "learned_router": 0.80, "adapted": 0.20, "random_router": 1.9}, 0.93),
    "static_slice": ({"adapted": 0.33}, 0.85),
}


def write_runs(
    root: Path, *, seeds: Sequence[int] = (0, 1, 2), backbones: Sequence[str] = ("synthetic-llama-3m",)
) -> Path:
    """A runs folder with dense, dense_same_tokens, static_slice, moefication and factorllm for every seed."""
    for record in records(seeds=seeds, backbones=backbones):
        write_record(root, record)
    return root


def records(*, seeds: Sequence[int], backbones: Sequence[str]) -> Iterator[dict[str, Any]]:
    for offset, backbone in enumerate(backbones):
        for seed in seeds:
            yield record("dense", backbone, seed, [point("dense", None, DENSE_NATS + offset, active=1.0)])
            same = point("adapted", None, DENSE_NATS + offset - 0.03 + 0.004 * seed, active=1.0)
            yield record("dense_same_tokens", backbone, seed, [same], tokens=1_000_000)
            for method in _ARMS:
                points = list(_method_points(method, seed, DENSE_NATS + offset))
                yield record(method, backbone, seed, points, tokens=1_000_000)


def record(
    method: str, backbone: str, seed: int, points: list[dict[str, Any]], *, tokens: int = 0, **config: Any
) -> dict[str, Any]:
    """One record of schema version 1."""
    text = f"{method}-{backbone}-{seed}-{json.dumps(config, sort_keys=True)}"
    identity = hashlib.sha256(text.encode()).hexdigest()[:10]
    return {
        "schema_version": 1,
        "identity": identity,
        "configuration": hashlib.sha256(f"{method}-{backbone}-{without_seeds(config)}".encode()).hexdigest()[:10],
        "name": f"{method}-{identity}",
        "study": "synthetic",
        "created_utc": "2026-01-01T00:00:00Z",
        "state": "done",
        "seed": seed,
        "backbone": {"name": backbone, "identity": f"id-{backbone}", "family": "llama", "parameters_total": 3_000_000},
        "data": {"name": "synthetic-text", "fingerprint": "feedface00"},
        "method": {
            "name": method,
            "variant": "as_published",
            "provenance": "published",
            "regime": "post_training",
            "num_blocks": NUM_BLOCKS,
            "block_size": 32,
            "knob": "k",
        },
        "protocol": {"perplexity": {"context": 256, "stride": 128, "tokens_counted": 9_000, "dtype": "float32"}},
        "config": {"seed": seed, "method": {"name": method, **config}, "paths": {"runs": f"/somewhere/{seed}"}},
        "environment": {"device_name": "Synthetic CPU", "threads": 2, "torch": "0.0-synthetic", "host": "nowhere"},
        "stages": [
            {"stage": "backbone", "identity": f"b-{backbone}", "wall_seconds": 90.0, "cpu_seconds": 170.0,
             "peak_rss_bytes": 1_500_000_000, "cached": seed > 0},
            {"stage": "adapt", "identity": f"a-{identity}", "wall_seconds": 20.0, "cpu_seconds": 38.0,
             "peak_rss_bytes": 1_200_000_000, "cached": False},
        ],
        "adaptation": {
            "tokens": tokens, "steps": tokens // 4096, "wall_seconds": 20.0,
            "phases": [{"phase": "finetune", "budget": None, "tokens": tokens}],
        },
        "points": points,
    }  # fmt: skip


def point(
    arm: str, budget: float | None, nats: float, *, active: float, speed: Sequence[dict[str, Any]] = (), **more: Any
) -> dict[str, Any]:
    """One point; accuracy and the other scores follow from `nats` by an invented rule."""
    return {
        "arm": arm,
        "budget": budget,
        "knob": "k",
        "active_ffn_frac": active,
        "quality": {
            "nats_per_token": nats,
            "perplexity": math.exp(nats),
            "bits_per_byte": nats / math.log(2) / 3,
            "tasks": {
                "next_line": {
                    "acc": max(0.25, 0.8 - 0.25 * (nats - DENSE_NATS)),
                    "acc_pmi": max(0.25, 0.85 - 0.25 * (nats - DENSE_NATS)),
                    "gold_nll": nats,
                    "margin": 1.0,
                    "kl_to_dense": nats - DENSE_NATS,
                    "agreement": 0.9,
                    "items": 200,
                }
            },
        },
        "cost": {
            "parameters_total": 3_000_000,
            "parameters_active": 1_000_000 + 2_000_000 * active,
            "ffn_flops_per_token": 4_000_000 * active,
            "router_flops_per_token": 10_000,
            "model_flops_per_token": 2_000_000 + 4_000_000 * active,
            "dense_ffn_flops_per_token": 4_000_000,
            "dense_model_flops_per_token": 6_000_000,
        },
        "speed": list(speed),
        "routing": {"counts_LB": [[1, 2]], "active_frac_L": [active]},
        "failure": None,
    } | more


def cell(
    phase: str, batch: int, tokens: int, context: int, *, ratio: float, ideal: float, control: str = "own"
) -> dict[str, Any]:
    """One speed cell with a 3 % interval."""
    dense_ms = (20.0 if phase == "prefill" else 2.0) * batch**0.8
    return {
        "phase": phase,
        "batch_size": batch,
        "tokens": tokens,
        "context": context,
        "dense_ms": {"median": dense_ms, "p10": dense_ms * 0.95, "p90": dense_ms * 1.1, "n": 40},
        "sparse_ms": {
            "median": dense_ms * ratio,
            "p10": dense_ms * ratio * 0.95,
            "p90": dense_ms * ratio * 1.1,
            "n": 40,
        },
        "ratio": ratio,
        "ratio_low": ratio * 0.97,
        "ratio_high": ratio * 1.03,
        "ideal_ratio": ideal,
        "captured_share": (1 - ratio) / (1 - ideal) if ideal < 0.999 else None,
        "executor": "grouped" if phase == "prefill" else "gather",
        "control": control,
        "samples_file": "samples.npz",
    }


def write_record(root: Path, record: dict[str, Any]) -> Path:
    folder = root / "record" / f"{record['method']['name']}-{record['identity']}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def write_scores(
    folder: Path, record: dict[str, Any], *, num_documents: int = 40, num_items: int = 300, windows: bool = True
) -> None:
    """The losses per document and answers per item behind a record's points; their means are the points' own losses."""
    documents, items = [], []
    for one in record["points"]:
        where = {"arm": one["arm"], "budget": one["budget"]}
        documents.append(document_rows(one["quality"]["nats_per_token"], num_documents, windows).assign(**where))
        if one["arm"] in ("adapted", "dense"):
            items.append(item_rows(one["quality"]["nats_per_token"], num_items).assign(**where))
    pd.concat(documents).to_parquet(folder / "documents.parquet")
    pd.concat(items or [pd.DataFrame()]).to_parquet(folder / "items.parquet")


def document_rows(nats: float, num_documents: int, windows: bool = True) -> pd.DataFrame:
    """Documents of 3 windows of 20 tokens, hard and easy ones, whose mean loss is `nats`."""
    shape = (num_documents, 3)
    hard_UW = np.random.default_rng(0).normal(0, 0.4, shape)  # the same for every model
    own_UW = np.random.default_rng(round(nats * 1e6)).normal(0, 0.05, shape)
    nats_UW = hard_UW + own_UW - (hard_UW + own_UW).mean() + nats
    rows = {
        "document": [f"d{number}" for number in range(num_documents)],
        "nll": 20 * nats_UW.sum(axis=1),
        "tokens": 60,
        "bytes": 240,
    }
    if windows:
        rows |= {"window_nll": list(20 * nats_UW), "window_tokens": [[20, 20, 20]] * num_documents}
    return pd.DataFrame(rows)


def item_rows(nats: float, num_items: int) -> pd.DataFrame:
    """Two-way items, hard and easy ones; the lead of the right option falls with `nats`."""
    easy_U = np.random.default_rng(1).normal(0.8, 1.0, num_items)  # the same for every model
    own_U = np.random.default_rng(round(nats * 1e6)).normal(0, 0.3, num_items)
    lead_U = easy_U + own_U + 2 * (DENSE_NATS - nats)
    gold_U = np.arange(num_items) % 2
    options = [[-9.0, -9.0 + lead] if gold else [-9.0 + lead, -9.0] for lead, gold in zip(lead_U, gold_U, strict=True)]
    names = [f"i{number}" for number in range(num_items)]
    return pd.DataFrame({"task": "next_line", "id": names, "gold": gold_U, "option_loglik": options})


# Losses over dense (nats) at 25 % active, of an oracle and after adaptation; none of it is anybody's result.
_STUDY = {
    "static_slice": (None, 0.33),
    "moefication": (0.06, 0.14),
    "factorllm": (0.30, 0.20),
    "method_c": (0.45, 0.30),
    "d": (0.20, 0.25),
    "method_e_balanced": (0.50, 0.36),
    "method_f": (0.12, 0.18),
    "method_g_dynamic": (0.08, 0.16),
    "method_h_with_a_long_name": (0.09, 0.17),
    "method_i": (0.33, 0.29),
    "method_j_choice": (0.07, 0.21),
    "method_k_keys": (0.70, 0.60),
    "method_l_upcycled": (0.25, 0.24),
    "method_m_activation": (0.03, 0.08),
    "method_n_threshold": (0.05, 0.12),
}


def write_study(root: Path, *, seeds: Sequence[int] = (0, 1, 2), num_documents: int = 40) -> Path:
    """14 routed methods and their controls without any timing, with the scores behind every point."""
    for seed in seeds:
        dense = [point("dense", None, DENSE_NATS, active=1.0)]
        same = [point("adapted", None, DENSE_NATS - 0.03 + 0.004 * seed, active=1.0)]
        written = [record("dense", "synthetic-llama-3m", seed, dense)]
        written.append(record("dense_same_tokens", "synthetic-llama-3m", seed, same, tokens=1_000_000))
        for method, losses in _STUDY.items():
            points = []
            for budget in (8, 16, 24):
                active = budget / NUM_BLOCKS + (0.03 if method == "method_n_threshold" else 0.0)
                for arm, loss in zip(("oracle_router", "adapted"), losses, strict=True):
                    if loss is not None:
                        wobble = 0.008 * math.sin(7 * seed + 3 * budget + 11 * len(arm) + sum(map(ord, method)))
                        nats = DENSE_NATS + loss * ((1 - active) / 0.75) ** 1.6 + wobble
                        points.append(point(arm, budget, nats, active=active))
            written.append(record(method, "synthetic-llama-3m", seed, points, tokens=1_000_000))
        for one in written:
            write_scores(write_record(root, one), one, num_documents=num_documents)
    return root


def _method_points(method: str, seed: int, dense_nats: float) -> Iterator[dict[str, Any]]:
    losses, captured = _ARMS[method]
    for budget in (8, 16, 24):
        active = budget / NUM_BLOCKS
        for arm, loss in losses.items():
            wobble = 0.006 * math.sin(7 * seed + 3 * budget + 11 * len(arm) + len(method))
            nats = dense_nats + loss * (1.3 - active) ** 2.2 + wobble
            speed = list(_speed(active, captured, seed)) if arm == "adapted" else []
            yield point(arm, budget, nats, active=active, speed=speed)


def _speed(active: float, captured: float, seed: int) -> Iterator[dict[str, Any]]:
    for phase, batch, tokens, context in CELLS:
        shared = active if batch == 1 or phase == "prefill" else min(1.0, active * 2.2)
        ideal = 0.3 + 0.7 * shared
        share = captured if phase == "prefill" else captured - 0.25
        ratio = 1 - share * (1 - ideal) + 0.006 * math.sin(5 * seed + 40 * active + batch)
        yield cell(phase, batch, tokens, context, ratio=ratio, ideal=ideal)
        yield cell(phase, batch, tokens, context, ratio=1.05, ideal=1.02, control="all_blocks")
