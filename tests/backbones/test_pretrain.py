"""Pretraining on the spot: learns, is a function of its seeds, goes on after an interruption, leaves a plain folder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import TOY_VOCAB, tiny_tokenizer

from moesaic.backbones.base import BackboneError
from moesaic.backbones.pretrain import PretrainHere
from moesaic.backbones.pretrain_module import Pretraining
from moesaic.backbones.source import load_backbone
from moesaic.data.tokens import TokenSplit
from moesaic.ffn.sites import find_ffns
from moesaic.training.fit import FitConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_inner": 32, "n_layer": 1, "n_head": 2}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOY = PretrainHere(
    name="toy",
    architecture=LLAMA,
    vocab_size=TOY_VOCAB,
    context=16,
    fit=FitConfig(steps=12, batch_size=4, lr=1e-2, checkpoint_every_steps=3, log_every_steps=1),
)


def counting_tokens() -> TokenSplit:
    """0 1 2 ... 63 0 1 ...: the next token is certain."""
    return TokenSplit(
        tokens_N=np.arange(4096, dtype=np.uint16) % TOY_VOCAB, documents=(), separator_id=0, provenance={}
    )


def pretrained(backbone: PretrainHere, folder: Path, *, seed: int = 0) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    backbone.materialise(folder, tokens=counting_tokens(), tokenizer=tiny_tokenizer(), seed=seed)
    return load_backbone(folder)[0].state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2, OPT], ids=lambda architecture: architecture["model_type"])
def test_learns_and_leaves_an_ordinary_folder(tmp_path: Path, architecture: dict) -> None:
    backbone = replace(TOY, architecture=architecture, fit=replace(TOY.fit, steps=60))
    pretrained(backbone, tmp_path / "stage")
    model, tokenizer = load_backbone(tmp_path / "stage")
    rows = [json.loads(line) for line in (tmp_path / "stage/pretrain/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(TOY_VOCAB), abs=0.3)  # it starts by knowing nothing
    with torch.no_grad():
        ids = torch.arange(16)[None]
        assert float(model(input_ids=ids, labels=ids).loss) < 1.0
    assert find_ffns(model)[0].read().width == 32
    assert tokenizer("w3", add_special_tokens=False)["input_ids"] == [3]
    assert not list(tmp_path.glob("**/*.ckpt"))
    assert model.config.max_position_embeddings == 16
    assert (model.config.eos_token_id, model.generation_config.pad_token_id) == (0, 0)


def test_weights_are_a_function_of_both_seeds(tmp_path: Path) -> None:
    first = pretrained(TOY, tmp_path / "a")
    torch.rand(7)
    assert same(pretrained(TOY, tmp_path / "b"), first)
    assert not same(pretrained(TOY, tmp_path / "c", seed=1), first)
    assert not same(pretrained(replace(TOY, initial_seed=1), tmp_path / "d"), first)


def test_interrupted_pretraining_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrained(TOY, tmp_path / "whole")
    step = Pretraining.training_step

    def failing(self: Pretraining, batch: dict[str, Tensor], index: int) -> Tensor:
        if index == 7:
            raise RuntimeError("the lights went out")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "training_step", failing)
        with pytest.raises(RuntimeError, match="the lights went out"):
            pretrained(TOY, tmp_path / "cut")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    indices = []

    def counting(self: Pretraining, batch: dict[str, Tensor], index: int) -> Tensor:
        indices.append(index)
        return step(self, batch, index)

    monkeypatch.setattr(Pretraining, "training_step", counting)
    assert same(pretrained(TOY, tmp_path / "cut"), whole)
    assert indices == [6, 7, 8, 9, 10, 11]  # from the checkpoint after six steps


def test_embedding_of_the_separator_is_trained(tmp_path: Path) -> None:
    """As a padding index it would keep its initial zeros, and every document begins after it."""
    embedding = pretrained(TOY, tmp_path / "a")["model.embed_tokens.weight"]
    assert embedding[0].abs().max() > 0


def test_skeleton_has_the_shapes_of_the_trained_model(tmp_path: Path) -> None:
    trained = pretrained(TOY, tmp_path / "a")
    skeleton = TOY.skeleton().state_dict()
    assert {name: tensor.shape for name, tensor in skeleton.items()} == {n: t.shape for n, t in trained.items()}
    assert all(tensor.is_meta for tensor in skeleton.values())


def test_missing_corpus_and_oversized_tokenizer_are_refused(tmp_path: Path) -> None:
    assert TOY.needs_corpus
    with pytest.raises(BackboneError, match="needs the tokens of a corpus"):
        TOY.materialise(tmp_path, tokens=None, tokenizer=None, seed=0)
    small = replace(TOY, vocab_size=60)
    with pytest.raises(BackboneError, match=r"has 64 tokens, but backbone\.vocab_size=60"):
        small.materialise(tmp_path, tokens=counting_tokens(), tokenizer=tiny_tokenizer(), seed=0)
