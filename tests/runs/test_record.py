"""The record: what was written is read back, and what does not fit is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object, to_plain
from moesaic.runs.record import RECORD_FILE, Record, read_record, write_record


def quantiles(median: float = 2.0) -> dict[str, Any]:
    return {"median": median, "p10": 1.0, "p90": 3.0, "n": 20}


def speed(**changes: Any) -> dict[str, Any]:
    base = {"phase": "decode", "batch_size": 1, "tokens": 32, "context": 128, "executor": "gather", "control": "own"}
    ratios = {"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9, "ideal_ratio": 0.5, "captured_share": 0.4}
    return {**base, **ratios, "dense_ms": quantiles(), "sparse_ms": quantiles(), **changes}


def point(**changes: Any) -> dict[str, Any]:
    quality = {
        "nats_per_token": 1.0,
        "perplexity": 2.718,
        "bits_per_byte": 0.4,
        "tasks": {"next_line": {"acc": 0.5, "gold_nll": 3.0, "items": 10}},
    }
    cost = dict.fromkeys(
        ("parameters_active", "ffn_flops_per_token", "router_flops_per_token", "model_flops_per_token"), 1.0
    )
    cost |= {"parameters_total": 10, "dense_ffn_flops_per_token": 4, "dense_model_flops_per_token": 8}
    routing = {"counts_LB": [[1, 2], [3, 0]], "active_frac_L": [0.5, 0.25]}
    whole = {"arm": "adapted", "budget": 4, "knob": "k", "active_ffn_frac": 0.25, "quality": quality, "cost": cost}
    return {**whole, "speed": [speed()], "routing": routing, "failure": None, **changes}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "identity": "0123456789",
        "configuration": "abcdef0123",
        "name": "moefication-0123456789",
        "study": "demo",
        "created_utc": "2025-01-01T00:00:00+00:00",
        "state": "done",
        "seed": 0,
        "backbone": {"name": "tiny", "identity": "a", "family": "llama", "parameters_total": 100},
        "data": {"name": "stdlib", "fingerprint": "b"},
        "method": {
            "name": "moefication",
            "variant": "corrected",
            "provenance": "published",
            "regime": "post_training",
            "num_blocks": 32,
            "block_size": 32,
            "knob": "k",
        },
        "protocol": {"context": 256},
        "config": {"seed": 0},
        "environment": {"device": "cpu"},
        "stages": [
            {
                "stage": "adapt",
                "identity": "c",
                "wall_seconds": 1,
                "cpu_seconds": 2,
                "peak_rss_bytes": 3,
                "cached": True,
            }
        ],
        "adaptation": {"tokens": 10, "steps": 1, "wall_seconds": 0.5},
        "points": [point()],
        **changes,
    }


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    made = strict_object(Record, record())
    assert write_record(tmp_path, made) == tmp_path / RECORD_FILE
    assert read_record(tmp_path) == made
    plain = json.loads((tmp_path / RECORD_FILE).read_text())
    assert plain["points"][0]["quality"]["tasks"]["next_line"]["acc"] == 0.5
    assert plain["points"][0]["speed"][0]["dense_ms"]["median"] == 2.0
    assert "_target_" not in json.dumps(plain)
    assert to_plain(made, Record) == plain


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (record(schema_version=2), r"^schema_version=2 is not 1"),
        (record(points=[point(), point()]), r"arm 'adapted' at budget 4\.0 twice"),
        (record(points=[point(arm="adaptd")]), r"^points\[0\]\.arm='adaptd' .*did you mean 'adapted'\?"),
        (record(points=[point(active_ffn_frac=25)]), r"^points\[0\]\.active_ffn_frac=25\.0 is no fraction"),
        (record(points=[point(quality=None)]), r"points\[0\]\.failure is null, but arm"),
        (record(points=[point(speed=[speed(ratio=1.5)])]), r"^points\[0\]\.speed\[0\]\.ratio=1\.5 lies outside"),
        (record(points=[point(speed=[speed(dense_ms=quantiles(9.0))])]), r"dense_ms\.median=9\.0 lies outside"),
        (record(points=[point(routing={"counts_LB": [], "active_frac_L": [1.0]})]), r"counts_LB has 0 layers"),
        (record(decode_latency=3), r"unknown key decode_latency"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strict_object(Record, node)


def test_a_failed_point_needs_no_numbers() -> None:
    failed = {"arm": "adapted", "budget": 1, "knob": "k", "failure": {"reason": "diverged", "message": "loss is nan"}}
    assert strict_object(Record, record(points=[failed])).points[0].quality is None


@pytest.mark.parametrize("text", [None, "{", "[]", '{"identity": 1}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/record\.json is no record"):
        read_record(tmp_path)


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    broken = strict_object(Record, record(protocol={}))
    broken.protocol["loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []
