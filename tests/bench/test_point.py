"""One point from disk: folders in, rows and a samples file out, here and in a fresh process."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from bench.toy import prompts_NC, sparse_toy
from toys import tiny_model

from moesaic.bench.config import BenchConfig
from moesaic.bench.point import BenchRequest, bench_point
from moesaic.bench.worker import run_fresh
from moesaic.sparse.select import TopK

CONFIG = BenchConfig(
    batch_sizes=(2,), prefill_tokens=8, decode_context=6, decode_steps=2, rounds=2, controls=(), threads=1
)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> BenchRequest:
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "dense")
    sparse_toy().save_pretrained(folder / "sparse")
    return BenchRequest(
        dense=folder / "dense",
        sparse=folder / "sparse",
        select=TopK(k=3),
        prompts=prompts_NC(2, 8).numpy(),
        config=CONFIG,
        samples=folder / "samples.parquet",
    )


def test_rows_and_samples(request_: BenchRequest) -> None:
    result = bench_point(request_)
    assert [(row["phase"], row["active_block_frac"], row["samples_file"]) for row in result["speed"]] == [
        ("prefill", 0.75, "samples.parquet"),
        ("decode", 0.75, "samples.parquet"),
    ]
    assert result["ceilings"]["threads"] == 1
    samples = pd.read_parquet(request_.samples)
    assert samples.groupby(["phase", "arm"]).size().tolist() == [2, 2, 2, 2]


def test_the_dense_model_against_itself_in_another_dtype(request_: BenchRequest) -> None:
    config = replace(CONFIG, dtype="bfloat16", phases=("prefill",))
    result = bench_point(replace(request_, sparse=request_.dense, select=None, config=config))
    assert result["ceilings"]["dtype"] == "bfloat16"
    assert result["speed"][0]["ideal_ratio"] == 1


def test_the_same_in_a_fresh_process(request_: BenchRequest) -> None:
    outcome = run_fresh(bench_point, request_, timeout_seconds=300)
    assert outcome.failure is None
    assert outcome.result is not None
    assert len(outcome.result["speed"]) == 2


def test_a_missing_model_is_told(request_: BenchRequest, tmp_path: Path) -> None:
    outcome = run_fresh(bench_point, replace(request_, sparse=tmp_path / "nowhere"), timeout_seconds=300)
    assert outcome.failure is not None
    assert "nowhere" in outcome.failure.message
