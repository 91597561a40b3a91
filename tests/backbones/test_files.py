import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.backbones.base import BackboneError
from moesaic.backbones.files import check_model_folder, content_hash, folder_fingerprint


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(8, 8)}, folder / f"model-{number}.safetensors")
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_whole_folder_passes_and_readme_does_not_count(model_folder: Path) -> None:
    check_model_folder(model_folder)
    before = folder_fingerprint(model_folder)
    (model_folder / "README.md").write_text("words")
    assert folder_fingerprint(model_folder) == before


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors", "tokenizer.json"])
def test_fingerprint_sees_every_file(model_folder: Path, name: str) -> None:
    before = folder_fingerprint(model_folder)
    if name.endswith(".json"):
        (model_folder / name).write_text('{"model_type": "gpt2"}')
    else:
        save_file({"w2": torch.zeros(8, 8)}, model_folder / name)
    assert folder_fingerprint(model_folder) != before


def test_fingerprint_sees_the_inside_of_a_large_file(tmp_path: Path) -> None:
    """Fine-tuning the FFNs alone leaves both ends and the size of a file as they were."""
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(12 * 2**20))
    before = content_hash([path])
    data = bytearray(12 * 2**20)
    data[3 * 2**20 : 4 * 2**20] = b"x" * 2**20
    path.write_bytes(data)
    assert content_hash([path]) != before


def test_order_of_files_does_not_matter(model_folder: Path) -> None:
    files = list(model_folder.iterdir())
    assert content_hash(files) == content_hash(reversed(files))


def test_what_is_wrong_is_said(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="nowhere is not a folder"):
        check_model_folder(tmp_path / "nowhere")
    (model_folder / "model-2.safetensors").rename(tmp_path / "gone")
    with pytest.raises(BackboneError, match=r"lacks 1 of 2 weight files: model-2\.safetensors"):
        check_model_folder(model_folder)
    whole = (tmp_path / "gone").read_bytes()
    (model_folder / "model-2.safetensors").write_bytes(whole[:-10])
    with pytest.raises(BackboneError, match=rf"model-2\.safetensors \({len(whole) - 10} bytes\) is corrupt or cut off"):
        check_model_folder(model_folder)
    (model_folder / "config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"cannot read .*config\.json"):
        check_model_folder(model_folder)
    (model_folder / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"has no config\.json.*Found: model-1\.safetensors"):
        check_model_folder(model_folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="no weights"):
        check_model_folder(tmp_path)
    with pytest.raises(BackboneError, match=r"cannot read .*weights\.bin: No such file"):
        content_hash([tmp_path / "weights.bin"])
