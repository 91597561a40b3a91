"""lm-eval on in-memory models: what comes back, against the model asked directly; and that nobody else notices."""

import math
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import TOY_VOCAB, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moesaic.data.tokenizer import train_bpe
from moesaic.evaluate.harness import run_tasks
from moesaic.evaluate.items import best_option
from moesaic.evaluate.tasks.base import PackagedTask, Question
from moesaic.evaluate.tasks.harness import HarnessTask

QUESTIONS = [
    Question(id="one", context="the cat", options=(" sat", " on the mat", " ran"), gold=1),
    Question(id="two", context="a dog and", options=(" a cat", " the", " ran off"), gold=0),
    Question(id="three", context="the mat", options=(" on", " sat on it", " ran"), gold=2),
]


class Fixed(PackagedTask):
    """Three questions known by heart."""

    def questions(self, documents: Any, *, seed: int) -> list[Question]:
        return QUESTIONS


class Empty(PackagedTask):
    def questions(self, documents: Any, *, seed: int) -> list[Question]:
        return []


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["the cat sat on the mat, a dog and a cat ran off it"], 280)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=TOY_VOCAB * 5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error alone would not do: libraries swallow it and go on."""
    asked: list[object] = []

    def refuse(host: object, *_: Any, **__: Any) -> None:
        asked.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def option_loglik(model: PreTrainedModel, context: list[int], option: list[int]) -> float:
    """log P(option | context), one token after the other."""
    total = 0.0
    for at, token in enumerate(option):
        with torch.no_grad():
            logits = model(torch.tensor([context + option[:at]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


def test_option_and_baseline_logliks_by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    result = run_tasks(model, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)["fixed"]
    assert [item.id for item in result.items] == ["one", "two", "three"]
    for item, question in zip(result.items, QUESTIONS, strict=True):
        assert item.gold == question.gold
        assert item.baseline_loglik is not None
        context = tokenizer.encode(question.context)
        for option, own, alone in zip(question.options, item.option_loglik, item.baseline_loglik, strict=True):
            tokens = tokenizer.encode(option)
            assert own == pytest.approx(option_loglik(model, context, tokens), abs=1e-4)
            assert alone == pytest.approx(option_loglik(model, [tokenizer.bos_token_id], tokens), abs=1e-4)


def test_our_means_are_those_of_lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    result = run_tasks(model, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)["fixed"]
    summary = result.summary(result.items)
    assert summary["acc"] == result.metrics["acc"]
    assert summary["acc_pmi"] == result.metrics["acc_mutual_info"]
    assert summary["agreement"] == 1.0
    assert summary["kl_to_dense"] == pytest.approx(0.0)
    assert set(summary) >= {"acc_norm", "gold_nll", "margin", "items"}
    assert summary["acc"] == np.mean([best_option(item.option_loglik) == item.gold for item in result.items])
    assert result.rows()[0] | {"option_loglik": 0, "baseline_loglik": 0} == {
        "task": "fixed",
        "id": "one",
        "gold": 1,
        "option_loglik": 0,
        "baseline_loglik": 0,
    }


def test_the_batch_size_is_set_told_and_harmless(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    one, many = (run_tasks(model, tokenizer, {"fixed": Fixed()}, batch_size=size, seed=0)["fixed"] for size in (1, 16))
    assert (one.protocol["batch_size"], many.protocol["batch_size"]) == (1, 16)
    for left, right in zip(one.items, many.items, strict=True):
        assert left.option_loglik == pytest.approx(right.option_loglik, abs=1e-4)


def test_limit_and_progress(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    result = run_tasks(
        model, tokenizer, {"fixed": Fixed()}, batch_size=5, seed=0, limit=2, progress=lambda d, t: seen.append((d, t))
    )
    assert len(result["fixed"].items) == 2
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (12, 12)


def test_nobody_else_notices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    model.train()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[union-attr]
    run_tasks(model, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)
    assert model.training
    model.eval()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[union-attr]
    assert capfd.readouterr() == ("", "")


def test_progress_may_write_to_the_terminal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tasks(
        model, tokenizer, {"fixed": Fixed()}, batch_size=99, seed=0, progress=lambda d, t: print(d, t, file=sys.stderr)
    )
    assert capsys.readouterr().err.endswith("18 18\n")


def test_no_questions_are_an_error(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="task empty: no question"):
        run_tasks(model, tokenizer, {"empty": Empty()}, batch_size=4, seed=0)
    assert run_tasks(model, tokenizer, {}, batch_size=4, seed=0) == {}


def test_nan_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = tiny_model("llama", vocab_size=TOY_VOCAB * 5)
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"are \[nan"):
        run_tasks(broken, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)


def test_an_option_longer_than_the_context_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    short = tiny_model("llama", vocab_size=TOY_VOCAB * 5, max_position_embeddings=2)
    with pytest.raises(ValueError, match="context of 2"):
        run_tasks(short, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)


def test_cut_contexts_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    short = tiny_model("llama", vocab_size=TOY_VOCAB * 5, max_position_embeddings=3)
    result = run_tasks(short, tokenizer, {"fixed": Fixed()}, batch_size=4, seed=0)["fixed"]
    assert result.protocol["truncated_requests"] > 0


YAML_TASK = """
task: local_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def yaml_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "the cat", "choices": ["sat", "mat"], "answer": "mat"}\n' * 2)
    (tmp_path / "local_pairs.yaml").write_text(YAML_TASK.format(rows=rows))
    return tmp_path


def test_a_local_yaml_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, yaml_folder: Path) -> None:
    task = HarnessTask(task="local_pairs", include_path=yaml_folder)
    result = run_tasks(model, tokenizer, {"mine": task}, batch_size=4, seed=0)["local_pairs"]
    assert [(item.gold, len(item.option_loglik), item.baseline_loglik) for item in result.items] == [(1, 2, None)] * 2
    assert result.summary()["acc"] == result.metrics["acc"]


def test_an_unknown_task_gets_the_nearest_name(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, yaml_folder: Path
) -> None:
    task = HarnessTask(task="local_piars", include_path=yaml_folder)
    with pytest.raises(ValueError, match="'local_piars'; did you mean 'local_pairs'"):
        run_tasks(model, tokenizer, {"mine": task}, batch_size=4, seed=0)
