"""Timing two toys: rows, samples, order, and that the models are left as they were. Never how long it took."""

from itertools import count
from typing import Any

import pandas as pd
import pytest
import torch
from bench.toy import prompts_NC, sparse_toy
from toys import tiny_model

from moesaic.bench import timing as timing_module
from moesaic.bench.calls import Cell, cells
from moesaic.bench.check import OutputMismatchError
from moesaic.bench.config import BenchConfig
from moesaic.bench.timing import Timing, time_models
from moesaic.config.strict import strict_object
from moesaic.runs.record import Speed
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.select import TopK

SMALL = {
    "batch_sizes": (1, 3),
    "prefill_tokens": 12,
    "decode_context": 8,
    "decode_steps": 3,
    "rounds": 2,
    "warm_up_rounds": 1,
}


def timed(own: Any, **settings: Any) -> Timing:
    ticks = count()
    config = BenchConfig(**{**SMALL, **settings})
    return time_models(tiny_model("llama"), own, prompts_NC(), config, clock=lambda: float(next(ticks)))


def test_one_row_per_cell_and_arm_fits_the_record() -> None:
    result = timed(sparse_toy(select=TopK(k=2)), controls=("all_blocks", "balanced"))
    cells_of_rows = [(row["phase"], row["batch_size"], row["control"]) for row in result.speed]
    assert cells_of_rows == [
        (phase, size, control)
        for phase in ("prefill", "decode")
        for size in (1, 3)
        for control in ("own", "all_blocks", "balanced")
    ]
    for row in result.speed:
        assert strict_object(Speed, row).ratio == 1  # every call takes one tick of the fake clock
        share = 1.0 if row["control"] == "all_blocks" else 0.5
        assert row["active_block_frac"] == share
        assert row["executor"] in EXECUTORS
    decode = result.speed[-1]
    assert (decode["tokens"], decode["context"]) == (3, 8)
    assert decode["dense_ms"]["median"] == pytest.approx(1000 / 3)  # per token


def test_samples_are_raw_and_interleaved() -> None:
    samples = pd.DataFrame(timed(sparse_toy(), controls=("balanced",)).samples)
    assert len(samples) == 4 * 3 * 2
    assert sorted(samples.arm.unique()) == ["balanced", "dense", "own"]
    assert samples.groupby(["phase", "batch_size", "arm"])["round"].apply(list).tolist() == [[0, 1]] * 12


def test_the_order_of_calls_is_dense_own_dense_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, own = tiny_model("llama"), sparse_toy()
    log: list[str] = []
    interleave = timing_module.interleave

    def logged(arms: Any, **options: Any) -> Any:
        log.clear()
        return interleave(arms, **options)

    monkeypatch.setattr(timing_module, "interleave", logged)
    dense.register_forward_hook(lambda *_: log.append("A"))
    own.register_forward_hook(lambda *_: log.append("B"))
    config = BenchConfig(**{**SMALL, "phases": ("decode",), "batch_sizes": (1,), "controls": ()})
    time_models(dense, own, prompts_NC(), config)
    assert "".join(log) == ("AAA" + "BBB") * 3  # one warm-up and two rounds of three steps each


def test_models_are_left_as_they_were() -> None:
    own = sparse_toy(executor="loop")
    timed(own, controls=("all_blocks",), executors=("grouped",))
    assert [(layer.select, layer.executor) for layer in sparse_layers(own)] == [(TopK(k=1), "loop")] * 2


def test_more_executors_are_more_arms() -> None:
    result = timed(
        sparse_toy(executor="loop"), phases=("prefill",), batch_sizes=(1,), controls=(), executors=("grouped",)
    )
    assert [(row["control"], row["executor"]) for row in result.speed] == [("own", "loop"), ("own", "grouped")]


def test_a_dense_model_is_timed_as_it_is() -> None:
    result = timed(tiny_model("llama", seed=1))
    assert [(row["control"], row["executor"], row["ideal_ratio"]) for row in result.speed] == [
        ("own", "dense", 1.0)
    ] * 4
    assert result.speed[0]["captured_share"] is None


def test_a_mismatch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXECUTORS, "loop", lambda x_TD, *_: x_TD)
    with pytest.raises(OutputMismatchError):
        timed(sparse_toy(executor="loop"))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_do_not_generate_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="no causal language model"):
        time_models(tiny_model(family), tiny_model(family), prompts_NC(), BenchConfig(**SMALL))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_decode_on_the_cache_gives_the_logits_of_a_prefill(family: str) -> None:
    model = tiny_model(family)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda *args: seen.append(args[-1].logits[:, -1]))
    ids_NC = prompts_NC(2, 12)
    with torch.inference_mode():
        decode = Cell(phase="decode", batch_size=2, tokens=4, context=8, steps=4)
        prepare = decode.prepare(model, ids_NC)
        for _ in range(2):  # a second round starts from the same cache
            prepare()()
            whole = model(ids_NC).logits[:, -1]
            assert torch.allclose(seen[-2], whole, atol=1e-5)


def test_cells() -> None:
    found = cells(BenchConfig(**SMALL))
    assert [(cell.phase, cell.batch_size, cell.call.tokens, cell.call.context) for cell in found] == [
        ("prefill", 1, 12, 0),
        ("prefill", 3, 12, 0),
        ("decode", 1, 1, 9),
        ("decode", 3, 1, 9),
    ]


class Acausal(TopK):
    """Top-k that claims to look at later tokens."""

    causal = False


def test_decode_is_timed_only_where_routing_is_causal() -> None:
    assert {row["phase"] for row in timed(sparse_toy(select=Acausal(k=2))).speed} == {"prefill"}
