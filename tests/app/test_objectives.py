"""Whole experiments on models that are no causal language models: from config to record, on toys."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from app.conftest import story
from toys import tiny_model
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from moesaic.app.compose import compose_plain
from moesaic.app.pipeline import plan_experiment, run_experiment
from moesaic.app.schema import MoesaicConfig
from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object
from moesaic.data.tokenizer import train_bpe
from moesaic.evaluate.items import items_from_rows, summarise
from moesaic.report.load import load
from moesaic.report.results import analyse
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.model import load_model

VOCAB = 300
AUTO = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
CLASS = {"bert": "masked_lm", "roberta": "masked_lm", "t5": "seq2seq"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per family: a toy of D 16 and F 64, and a tokenizer with a mask."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["\n\n".join(story(seed) for seed in range(60))], vocab_size=VOCAB, masks=True)
    for family, auto in AUTO.items():
        width = {"d_ff": 64} if family == "t5" else {"intermediate_size": 64, "pad_token_id": 1}
        config = AutoConfig.for_model(**{**tiny_model(family).config.to_dict(), "vocab_size": VOCAB, **width})
        auto.from_config(config).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a corpus of short texts, half of them said to begin with "the"."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, seeds in (("train", range(80)), ("heldout", range(80, 120))):
        rows = [{"text": story(seed)[: 20 + seed % 30], "label": seed % 2} for seed in seeds]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=labelled", *(f"data.{split}={folder / split}.jsonl" for split in ("train", "heldout"))]


def run(overrides: list[str]) -> tuple[Path, dict]:
    plain = compose_plain(overrides)
    folder = run_experiment(strict_object(MoesaicConfig, plain), plain)
    return folder, json.loads((folder / "record.json").read_text())


def on(overrides: list[str], models: Path, family: str) -> list[str]:
    return [*overrides, f"backbone.path={models / family}", f"backbone.auto_class={CLASS[family]}"]


def classifying(overrides: list[str], models: Path, labelled: list[str]) -> list[str]:
    backbone = [
        "backbone=roberta_classifier",
        "backbone@backbone.encoder=hf",
        f"backbone.encoder.path={models / 'roberta'}",
        "backbone.encoder.auto_class=masked_lm",
        "backbone.context=32",
        "backbone.fit={steps:3,batch_size:4,lr:1e-3,warmup_steps:0}",
    ]
    kept = [each for each in overrides if not each.startswith(("backbone", "data"))]
    return [*kept, *backbone, *labelled, "evaluate=loss", "evaluate.perplexity.context=32"]


@pytest.mark.parametrize("method", ["moefication", "factorllm", "static_slice", "dense_same_tokens"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_encoders_and_encoder_decoders_go_from_config_to_record(family, method, overrides, models, tmp_path):
    budget = [] if method == "dense_same_tokens" else ["method.budgets=[2]"]
    _, record = run([*on(overrides, models, family), f"method={method}", *budget])
    assert record["state"] == "done"
    objective = {"bert": "masked_token", "t5": "second_half"}[family]
    assert record["protocol"]["perplexity"]["objective"] == objective
    assert record["backbone"]["family"] == family
    adapted = next(point for point in record["points"] if point["arm"] == "adapted")
    assert adapted["quality"]["perplexity"] > 1
    assert adapted["quality"]["bits_per_byte"] is None
    if method in ("moefication", "factorllm"):
        assert {"learned_router", "oracle_router", "all_blocks"} <= {point["arm"] for point in record["points"]}
        saved = max((tmp_path / "runs" / "adapt").glob("*/modeling_moesaic.py"))
        assert len(sparse_layers(load_model(saved.parent))) == (4 if family == "t5" else 2)


@pytest.mark.parametrize("method", ["dense", "dense_same_tokens", "static_slice", "moefication"])
def test_a_classifier_goes_from_config_to_record(method, overrides, models, labelled, tmp_path):
    budget = ["method.budgets=[2]"] if method in ("static_slice", "moefication") else []
    folder, record = run([*classifying(overrides, models, labelled), f"method={method}", *budget])
    assert record["state"] == "done"
    assert record["protocol"]["perplexity"]["objective"] == "classification"
    documents, items = (pd.read_parquet(folder / f"{name}.parquet") for name in ("documents", "items"))
    for point in record["points"]:
        score = point["quality"]["tasks"]["labelled"]
        assert score["items"] == 40
        assert score["gold_nll"] == pytest.approx(point["quality"]["nats_per_token"])
        assert score["agreement"] is not None
        own = items[items["arm"] == point["arm"]]
        assert summarise(items_from_rows(own.to_dict("records")))["acc"] == score["acc"]
    assert len(documents) == 40 * len(record["points"])
    assert set(documents["tokens"]) == {1}
    assert analyse(load(tmp_path / "runs"), quality="labelled.acc").runs.table["task.labelled.acc_frac"].notna().all()


def test_a_dense_fine_tune_comes_first_where_a_method_asks_for_it(overrides, models, labelled):
    prepare = "method.prepare={_target_:moesaic.methods.finetune.FinetuneDense,fit:{steps:2,batch_size:4,lr:1e-3}}"
    _, record = run([*classifying(overrides, models, labelled), "method=static_slice", "method.budgets=[2]", prepare])
    assert [point["arm"] for point in record["points"]] == ["prepared_dense", "adapted"]


def test_backbones_that_are_made_here_bring_their_tokenizer(overrides, tmp_path):
    sizes = "{model_type:roberta,hidden_size:16,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2}"
    kept = [each for each in overrides if not each.startswith("backbone")]
    backbone = [
        "backbone=roberta_gelu",
        "backbone.vocab_size=300",
        "backbone.context=32",
        f"backbone.architecture={sizes}",
        "backbone.fit={steps:2,batch_size:2,lr:1e-3,warmup_steps:0}",
    ]
    _, record = run([*kept, *backbone, "method=static_slice", "method.budgets=[2]"])
    assert record["protocol"]["perplexity"]["objective"] == "masked_token"


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        (
            "bert",
            "evaluate=default",
            r"evaluate\.tasks: backbone=hf is a BertForMaskedLM.*Add evaluate=loss bench=none",
        ),
        ("t5", "bench=default", r"bench\.phases: backbone=hf is a T5ForConditional.*Add evaluate=loss bench=none"),
        ("t5", "adapt.context=31", r"adapt\.context=31 has no equal halves"),
        ("bert", "adapt.context=100", r"adapt\.context=100 exceeds the 64 positions"),
    ],
)
def test_what_is_for_causal_models_only_is_refused_before_any_stage(family, override, message, overrides, models):
    given = [*on(overrides, models, family), "method=dense", override]
    with pytest.raises(ConfigError, match=message):
        plan_experiment(strict_object(MoesaicConfig, compose_plain(given)))


def test_a_classifier_wants_labels(overrides, models, labelled):
    given = [*classifying(overrides, models, labelled), "method=dense", "data=text", "data.train=a", "data.heldout=b"]
    with pytest.raises(ConfigError, match=r"backbone\.labels: Interpolation key 'data\.labels' not found"):
        compose_plain([each for each in given if not each.startswith("data=labelled")])
    with pytest.raises(ConfigError, match=r"data=text has no labels, but backbone=.* is a classifier"):
        plan_experiment(
            strict_object(
                MoesaicConfig,
                compose_plain([*given[:-3], "data=text", "data.train=a", "data.heldout=b", "backbone.labels=[a,b]"]),
            )
        )
