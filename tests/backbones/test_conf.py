"""Every conf/backbone YAML composes, passes the strict walk and builds its shapes, without network."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moesaic.backbones.base import Backbone, BackboneError
from moesaic.backbones.classifier import Classifier
from moesaic.backbones.pretrain import PretrainHere
from moesaic.backbones.pretrained import Pretrained
from moesaic.config.strict import ConfigError, strict_object
from moesaic.data.objective import positions_of
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "backbone").glob("*.yaml"))
MANDATORY = {"hf": ["backbone.path=org/model"], "llama2c": ["backbone.checkpoint=a.bin", "backbone.tokenizer=t.bin"]}
GIVEN = {"roberta_classifier": ["+data.labels=[no,yes]"]}  # by the corpus
PRETRAINED_HERE = {
    "gpt2_gelu": "gelu_new",
    "llama_relu": "relu",
    "llama_swiglu": "silu",
    "opt_relu": "relu",
    "roberta_gelu": "gelu",
    "t5_relu": "relu",
}


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"backbone/{name}", overrides=list(overrides))
    return OmegaConf.to_container(config.backbone, resolve=True)


def backbone(name: str, *overrides: str) -> Backbone:
    given = [*MANDATORY.get(name, []), *GIVEN.get(name, [])]
    return strict_object(Backbone, composed(name, *overrides, *given), "backbone")


@pytest.mark.parametrize("name", NAMES)
def test_yaml_becomes_its_dataclass(name: str) -> None:
    assert backbone(name).name == name


@pytest.mark.parametrize("name", MANDATORY)
def test_what_only_the_user_knows_is_mandatory(name: str) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.(path|checkpoint) is required"):
        strict_object(Backbone, composed(name), "backbone")


@pytest.mark.parametrize(("name", "activation"), PRETRAINED_HERE.items())
def test_pretrained_here_is_small_and_wide(name: str, activation: str) -> None:
    skeleton = backbone(name).skeleton()
    assert 2e6 < skeleton.num_parameters() < 5e6
    for site in find_ffns(skeleton):
        ffn = site.read()
        assert ffn.width == 4 * ffn.dim
        assert ffn.activation == activation
        assert ffn.gated == name.startswith("llama")


def test_issue_names_are_all_there() -> None:
    ready = "tinyllama-1.1b llama-2-7b mistral-7b qwen2.5-0.5b gemma-2b gpt2-medium opt-1.3b roberta-base t5-base"
    assert {*ready.split(), *PRETRAINED_HERE, "hf", "llama2c"} <= set(NAMES)
    auto = {name: b.auto_class for name in NAMES if isinstance(b := backbone(name), Pretrained)}
    assert {auto.pop("roberta-base"), auto.pop("t5-base")} == {"masked_lm", "seq2seq"}
    assert set(auto.values()) == {"causal_lm"}


def test_a_classifier_takes_its_classes_from_the_corpus_and_its_encoder_from_the_group() -> None:
    here, elsewhere = (
        backbone("roberta_classifier"),
        backbone("roberta_classifier", "backbone@backbone.encoder=roberta-base"),
    )
    assert isinstance(here, Classifier)
    assert isinstance(elsewhere, Classifier)
    assert (here.labels, here.encoder) == (("no", "yes"), backbone("roberta_gelu"))
    assert elsewhere.encoder == backbone("roberta-base")
    model = here.skeleton()
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert model.config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(BackboneError, match="is a GPT2LMHeadModel: a classifier is made from a masked language model"):
        backbone("roberta_classifier", "backbone@backbone.encoder=gpt2_gelu").skeleton()
    assert positions_of(model.config) == positions_of(backbone("gpt2_gelu").skeleton().config) == 256


def test_own_family_is_described_in_yaml() -> None:
    ffn = "+backbone.ffn={module: 'stage.*.feed', up: into, down: out, activation: relu}"
    assert backbone("hf", ffn).ffn == FFNPattern(module="stage.*.feed", up="into", down="out", activation="relu")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+backbone.architecture.hiden_size=8",
            r"architecture\.hiden_size is no argument of LlamaConfig; did you mean 'hidden_s",
        ),
        ("backbone.architecture.model_type=lama", "did you mean 'llama'"),
        ("backbone.architecture.model_type=bert_masked", "is no causal language model"),
        ("+backbone.architecture.vocab_size=8", "set vocab_size instead"),
        ("+backbone.auto_class=masked_lm", r"'llama' is no masked language model .* backbone.auto_class says which"),
        ("backbone.context=0", "context=0 must be at least 1"),
    ],
)
def test_wrong_architectures_stop_while_composing(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone("llama_swiglu", override)


def test_alias_of_the_context_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"architecture\.n_positions has a field of its own: set context instead"):
        backbone("gpt2_gelu", "+backbone.architecture.n_positions=8")


def test_fingerprint_follows_what_counts() -> None:
    first, again = backbone("llama_swiglu"), backbone("llama_swiglu")
    assert isinstance(first, PretrainHere)
    assert first.fingerprint() == again.fingerprint()
    assert backbone("llama_swiglu", "backbone.fit.lr=0.001").fingerprint() != first.fingerprint()
    assert backbone("llama_swiglu", "+backbone.fit.log_every_steps=3").fingerprint() == first.fingerprint()
