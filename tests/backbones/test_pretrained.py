"""Local folders are pointed at and checked; a hub that cannot be reached is one clear error."""

import json
from pathlib import Path

import pytest
import torch
from toys import tiny_model, tiny_tokenizer

from moesaic.backbones.base import BackboneError
from moesaic.backbones.pretrained import Pretrained
from moesaic.backbones.source import POINTER, load_backbone


def saved(folder: Path, family: str = "llama") -> Path:
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def materialised(backbone: Pretrained, folder: Path) -> Path:
    folder.mkdir()
    backbone.materialise(folder, tokens=None, tokenizer=None, seed=0)
    return folder


@pytest.mark.parametrize(("family", "auto"), [("llama", "causal_lm"), ("bert", "masked_lm"), ("t5_gated", "seq2seq")])
def test_local_folder_is_pointed_at_not_copied(tmp_path: Path, family: str, auto: str) -> None:
    source = saved(tmp_path / "model", family)
    backbone = Pretrained(name="toy", path=str(source), auto_class=auto)
    folder = materialised(backbone, tmp_path / "stage")
    assert [path.name for path in folder.iterdir()] == [POINTER]
    model, tokenizer = load_backbone(folder)
    expected = tiny_model(family).state_dict()
    assert not model.training
    assert type(model) is type(tiny_model(family))
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer("w5 w7", add_special_tokens=False)["input_ids"] == [5, 7]


def test_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    folder = materialised(Pretrained(name="toy", path="./model"), tmp_path / "stage")
    monkeypatch.chdir("/")
    load_backbone(folder)


def test_any_model_folder_loads_without_a_pointer(tmp_path: Path) -> None:
    assert load_backbone(saved(tmp_path / "model"))[0].num_parameters() == tiny_model("llama").num_parameters()


def test_dtype_is_the_files_own_unless_chosen(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    own = Pretrained(name="toy", path=str(tmp_path / "model"))
    wide = Pretrained(name="toy", path=str(tmp_path / "model"), dtype="float32")
    assert load_backbone(materialised(own, tmp_path / "a"))[0].dtype == torch.bfloat16
    assert load_backbone(materialised(wide, tmp_path / "b"))[0].dtype == torch.float32


def test_skeleton_has_shapes_and_no_weights(tmp_path: Path) -> None:
    skeleton = Pretrained(name="toy", path=str(saved(tmp_path / "model"))).skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.num_parameters() == tiny_model("llama").num_parameters()


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    backbone = Pretrained(name="toy", path=str(source))
    before = backbone.fingerprint()
    folder = materialised(backbone, tmp_path / "stage")
    tiny_model("llama", seed=1).save_pretrained(source)
    assert backbone.fingerprint() != before
    with pytest.raises(BackboneError, match=r"has changed since this run began .*Start the run again"):
        load_backbone(folder)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "a/b/c", "../x"])
def test_missing_path_stops_before_anything_is_loaded(path: str, tmp_path: Path) -> None:
    backbone = Pretrained(name="toy", path=path)
    with pytest.raises(BackboneError, match=r"does not exist .*config\.json and weights, or a hub name"):
        backbone.fingerprint()
    with pytest.raises(BackboneError, match="does not exist"):
        materialised(backbone, tmp_path / "stage")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BackboneError, match="is not a folder"):
        Pretrained(name="toy", path=str(tmp_path / "model.gguf")).fingerprint()


def test_weights_that_leave_the_model_half_empty_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"no fitting value for 9 weights of LlamaForCausalLM: model\.layers\.2"):
        load_backbone(materialised(Pretrained(name="toy", path=str(source)), tmp_path / "stage"))


def test_unknown_model_type_and_missing_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(BackboneError, match=r"cannot load Tokenizer of .*config\.json, weights and tokenizer"):
        load_backbone(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "moreformer"}')
    with pytest.raises(BackboneError, match="moreformer"):
        Pretrained(name="toy", path=str(tmp_path / "model")).skeleton()


def test_broken_pointer(tmp_path: Path) -> None:
    (tmp_path / POINTER).write_text('{"path": ')
    with pytest.raises(BackboneError, match=r"cannot read .*backbone\.json"):
        load_backbone(tmp_path)


def test_hub_name_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbone = Pretrained(name="toy", path="moesaic-tests/no-such-model", revision="v1")
    assert backbone.fingerprint() == "moesaic-tests/no-such-model@v1"
    with pytest.raises(
        BackboneError, match=r"'moesaic-tests/no-such-model' was looked up on the Hugging Face hub .*set backbone\.path"
    ):
        materialised(backbone, tmp_path / "stage")
    assert not (tmp_path / "stage" / POINTER).exists()
