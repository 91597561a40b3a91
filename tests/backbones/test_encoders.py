"""Encoders and encoder-decoders pretrained on the spot, and classifiers made from them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moesaic.backbones.base import BackboneError
from moesaic.backbones.classifier import Classifier
from moesaic.backbones.pretrain import PretrainHere
from moesaic.backbones.pretrained import Pretrained
from moesaic.backbones.source import ModelSource, load_backbone
from moesaic.data.corpus import DataError
from moesaic.data.objective import positions_of
from moesaic.data.tokenizer import train_bpe
from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.evaluate.perplexity import perplexity
from moesaic.training.fit import FitConfig

VOCAB, CONTEXT = 264, 16
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
FIT = FitConfig(steps=60, batch_size=8, lr=1e-2, checkpoint_every_steps=7, log_every_steps=1)
ROBERTA = PretrainHere(
    name="roberta",
    auto_class="masked_lm",
    architecture={"model_type": "roberta", **SIZES},
    vocab_size=VOCAB,
    context=CONTEXT,
    fit=FIT,
)
ARCHITECTURES = {
    "roberta": ROBERTA,
    "bert": replace(ROBERTA, architecture={"model_type": "bert", **SIZES}),
    "t5": replace(ROBERTA, auto_class="seq2seq", architecture=T5),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["ab"], 259, masks=True)


def split_of(tokenizer: PreTrainedTokenizerFast, *, labelled: bool = True) -> TokenSplit:
    """Documents of one letter over and over; the label says which half of the alphabet it comes from."""
    rng = np.random.default_rng(0)
    tokens, documents = [], []
    for number in range(300):
        letter, length = int(rng.integers(10, 20)), int(rng.integers(4, 12))
        label = int(letter >= 15) if labelled else None
        documents.append(TokenDocument(f"d{number}", len(tokens), length, length, label))
        tokens += [letter] * length + [tokenizer.eos_token_id]
    return TokenSplit(
        tokens_N=np.array(tokens, dtype=np.uint16),
        documents=tuple(documents),
        separator_id=tokenizer.eos_token_id,
        provenance={"name": "letters"},
        start_id=tokenizer.bos_token_id,
        mask_id=tokenizer.mask_token_id,
    )


def made(backbone: PretrainHere | Classifier, folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    folder.mkdir(exist_ok=True)
    backbone.materialise(folder, tokens=split_of(tokenizer), tokenizer=tokenizer, seed=0)
    return load_backbone(folder)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_encoder_learns_its_objective_and_comes_back_with_its_head(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    backbone = ARCHITECTURES[name]
    model = made(backbone, tmp_path / "stage", tokenizer)
    assert type(model) is type(backbone.skeleton())
    assert ModelSource.read(tmp_path / "stage").auto_class == backbone.auto_class
    found = perplexity(model, split_of(tokenizer), context=CONTEXT, batch_size=8)
    assert found.nats_per_token < 0.5 * math.log(VOCAB)  # it knows at least which ten letters there are
    assert positions_of(model.config) == (None if name == "t5" else CONTEXT)
    rows = [json.loads(line) for line in (tmp_path / "stage/pretrain/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCAB), rel=0.25 if name != "t5" else 1.0)


def test_a_tokenizer_without_padding_of_its_own_is_refused(tmp_path: Path) -> None:
    plain = train_bpe(["ab"], 257)
    with pytest.raises(BackboneError, match=r"pads with token 0, but backbone roberta with 1.*masks=True"):
        made(ROBERTA, tmp_path / "stage", plain)


CLASSIFIER = Classifier(
    name="letters",
    encoder=replace(ROBERTA, fit=replace(FIT, steps=3)),
    labels=("low", "high"),
    context=CONTEXT,
    fit=FIT,
)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_a_classifier_starts_from_the_encoder_and_learns_the_labels(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    backbone = replace(CLASSIFIER, encoder=replace(ARCHITECTURES[name], fit=CLASSIFIER.encoder.fit))
    model = made(backbone, tmp_path / "stage", tokenizer)
    assert model.config.id2label == {0: "low", 1: "high"}
    assert perplexity(model, split_of(tokenizer), context=CONTEXT, batch_size=8).nats_per_token < 0.2
    start = made(replace(backbone, fit=replace(FIT, steps=1, lr=1e-12)), tmp_path / "start", tokenizer)
    for key, tensor in load_backbone(tmp_path / "stage" / "encoder")[0].base_model.state_dict().items():
        torch.testing.assert_close(start.base_model.state_dict()[key], tensor, atol=1e-6, rtol=0)


def test_a_ready_classifier_is_loaded_as_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = replace(CLASSIFIER, fit=replace(FIT, steps=1), encoder=replace(ROBERTA, fit=replace(FIT, steps=1)))
    model = made(fast, tmp_path / "stage", tokenizer)
    ready = Pretrained(name="mine", path=str(tmp_path / "stage"), auto_class="sequence_classification")
    assert type(ready.skeleton()) is type(model)
    (tmp_path / "pointer").mkdir()
    ready.materialise(tmp_path / "pointer", tokens=None, tokenizer=None, seed=0)
    loaded = load_backbone(tmp_path / "pointer")[0].state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


def test_plain_text_makes_no_classifier(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    fast = replace(CLASSIFIER, encoder=replace(ROBERTA, fit=replace(FIT, steps=1)))
    with pytest.raises(DataError, match="document d0 of letters has no label"):
        fast.materialise(tmp_path, tokens=split_of(tokenizer, labelled=False), tokenizer=tokenizer, seed=0)
    with pytest.raises(ValueError, match="at least two different classes"):
        replace(CLASSIFIER, labels=("one",))
