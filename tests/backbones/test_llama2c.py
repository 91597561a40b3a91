"""llama2.c checkpoints: against run.c's own arithmetic written as loops here, and against the real 260k model."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import SHARED
from torch import Tensor

from moesaic.backbones.base import BackboneError
from moesaic.backbones.llama2c import Llama2c
from moesaic.backbones.source import load_backbone

STORIES = SHARED / "data" / "stories260k"
TALES = SHARED / "data" / "tinystories" / "train_prefix.txt"
D, F, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 262, 32
HEAD = D // HEADS
ORDER = {
    "embedding": (VOCAB, D),
    "att_norm": (LAYERS, D),
    "wq": (LAYERS, D, D),
    "wk": (LAYERS, KV_HEADS * HEAD, D),
    "wv": (LAYERS, KV_HEADS * HEAD, D),
    "wo": (LAYERS, D, D),
    "ffn_norm": (LAYERS, D),
    "w1": (LAYERS, F, D),
    "w2": (LAYERS, D, F),
    "w3": (LAYERS, F, D),
    "norm": (D,),
    "cos": (CONTEXT, HEAD // 2),
    "sin": (CONTEXT, HEAD // 2),
}
# sentencepiece's order: specials, bytes, then pieces; "ab" has a better score than "bb".
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", " "]


def write_checkpoint(path: Path, *, tied: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = ORDER if tied else ORDER | {"output": (VOCAB, D)}
    arrays = {name: generator.normal(size=shape).astype("<f4") * 0.4 for name, shape in shapes.items()}
    for name in ("att_norm", "ffn_norm", "norm"):
        arrays[name] += 1
    header = struct.pack("<7i", D, F, LAYERS, HEADS, KV_HEADS, VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    return arrays


def write_tokenizer(path: Path, pieces: list[tuple[str, float]]) -> None:
    entries = [struct.pack("<fi", score, len(text.encode())) + text.encode() for text, score in pieces]
    path.write_bytes(struct.pack("<i", max(len(text) for text, _ in pieces)) + b"".join(entries))


def run_c(arrays: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """run.c's forward in float64: rotated neighbours, grouped keys, one position after the other. Logits (T, V)."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    keys: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    values: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["embedding"][token].copy()
        for layer in range(LAYERS):
            a = rms(x, w["att_norm"][layer])
            q, k = w["wq"][layer] @ a, w["wk"][layer] @ a
            keys[layer].append(rotate(k, position))
            values[layer].append(w["wv"][layer] @ a)
            x += w["wo"][layer] @ attend(rotate(q, position), keys[layer], values[layer])
            a = rms(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ a
            x += w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ a))
        logits.append(w.get("output", w["embedding"]) @ rms(x, w["norm"]))
    return np.stack(logits)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / math.sqrt((x * x).mean() + 1e-5) * weight


def rotate(vector: np.ndarray, position: int) -> np.ndarray:
    rotated = vector.copy()
    for i in range(0, len(vector), 2):
        angle = position / 10000 ** ((i % HEAD) / HEAD)
        a, b = vector[i], vector[i + 1]
        rotated[i] = a * math.cos(angle) - b * math.sin(angle)
        rotated[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return rotated


def attend(q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    parts = []
    for head in range(HEADS):
        own, shared = slice(head * HEAD, (head + 1) * HEAD), head // (HEADS // KV_HEADS)
        theirs = slice(shared * HEAD, (shared + 1) * HEAD)
        score = np.array([q[own] @ key[theirs] / math.sqrt(HEAD) for key in keys])
        weight = np.exp(score - score.max())
        parts.append(sum(p * value[theirs] for p, value in zip(weight / weight.sum(), values, strict=True)))
    return np.concatenate(parts)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tok.bin"
    write_tokenizer(path, [(piece, 0.0) for piece in PIECES])
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_import_computes_what_run_c_computes(tmp_path: Path, tokenizer_file: Path, tied: bool) -> None:
    checkpoint = tmp_path / "model.bin"
    arrays = write_checkpoint(checkpoint, tied=tied)
    backbone = Llama2c(name="toy", checkpoint=checkpoint, tokenizer=tokenizer_file)
    folder = materialised(backbone, tmp_path / "folder")
    model, tokenizer = load_backbone(folder)
    tokens = [1, 259, 260, 17, 261, 5, 259]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, run_c(arrays, tokens), atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(tokenizer) == model.config.vocab_size == VOCAB
    skeleton = backbone.skeleton()
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def materialised(backbone: Llama2c, folder: Path) -> Path:
    folder.mkdir()
    backbone.materialise(folder, tokens=None, tokenizer=None, seed=0)
    return folder


def test_fingerprint_is_of_content(tmp_path: Path, tokenizer_file: Path) -> None:
    write_checkpoint(tmp_path / "tied.bin", tied=True)
    write_checkpoint(tmp_path / "untied.bin", tied=False)
    tied = Llama2c(name="a", checkpoint=tmp_path / "tied.bin", tokenizer=tokenizer_file)
    untied = Llama2c(name="a", checkpoint=tmp_path / "untied.bin", tokenizer=tokenizer_file)
    assert tied.fingerprint() == tied.fingerprint() != untied.fingerprint()


def test_damaged_checkpoints_say_what_header_and_file_hold(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "model.bin"
    write_checkpoint(path, tied=True)
    whole = path.read_bytes()
    backbone = Llama2c(name="toy", checkpoint=path, tokenizer=tokenizer_file)
    path.write_bytes(whole[:-4])
    promise = (
        rf"has {len(whole) - 4} bytes, but its header \(dim 16, .*vocab_size 262.* promises {len(whole)}: it is cut"
    )
    with pytest.raises(BackboneError, match=promise):
        backbone.fingerprint()
    path.write_bytes(whole + b"more")
    with pytest.raises(BackboneError, match="followed by something else"):
        materialised(backbone, tmp_path / "folder")
    path.write_bytes(whole[:9])
    with pytest.raises(BackboneError, match=r"has 9 bytes, but a llama2\.c header alone has 28"):
        backbone.skeleton()
    path.write_bytes(b"PK\x03\x04" * 50)
    with pytest.raises(BackboneError, match=r"does not begin like a llama2\.c checkpoint"):
        backbone.fingerprint()
    path.write_bytes(struct.pack("<7i", 0x616B3432, 2, 0, 0, 0, 0, 0))
    with pytest.raises(BackboneError, match="is a version 2 export; only the legacy format"):
        backbone.fingerprint()
    path.unlink()
    with pytest.raises(BackboneError, match=r"cannot read .*model\.bin: No such file"):
        backbone.fingerprint()


def test_damaged_tokenizers(tmp_path: Path, tokenizer_file: Path) -> None:
    write_checkpoint(tmp_path / "model.bin", tied=True)
    backbone = Llama2c(name="toy", checkpoint=tmp_path / "model.bin", tokenizer=tokenizer_file)
    tokenizer_file.write_bytes(tokenizer_file.read_bytes()[:-1])
    with pytest.raises(BackboneError, match=r"is cut off: .* after 261 of 262 tokens"):
        materialised(backbone, tmp_path / "a")
    write_tokenizer(tokenizer_file, [(piece, 0.0) for piece in PIECES[:-2]])
    with pytest.raises(BackboneError, match="has 260 tokens, but the checkpoint has 262"):
        materialised(backbone, tmp_path / "b")
    (tmp_path / "tok.model").write_bytes(b"nonsense")
    other = Llama2c(name="toy", checkpoint=tmp_path / "model.bin", tokenizer=tmp_path / "tok.model")
    with pytest.raises(BackboneError, match="as a sentencepiece model"):
        materialised(other, tmp_path / "c")


needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES} (MOESAIC_SHARED): the 260k model")
needs_tales = pytest.mark.skipif(not TALES.is_file(), reason=f"no {TALES} (MOESAIC_SHARED): TinyStories")


@pytest.fixture(scope="module", params=["tok512.bin", "tok512.model"])
def stories_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = Llama2c(name="stories260k", checkpoint=STORIES / "stories260K.bin", tokenizer=STORIES / request.param)
    return materialised(backbone, tmp_path_factory.mktemp("stories") / "folder")


@needs_stories
def test_260k_model_decodes_the_published_text(stories_folder: Path) -> None:
    model, tokenizer = load_backbone(stories_folder)
    assert model.num_parameters() == 260_032
    tokens = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0]
    expected = (STORIES / "expected_greedy_200_steps.txt").read_text()
    assert tokenizer.decode(tokens, skip_special_tokens=True) == expected


@needs_stories
@needs_tales
def test_260k_model_has_the_published_loss(stories_folder: Path) -> None:
    """1.334 nats: mean over the first 20 stories, as they stand between the marks, of the loss after <s>."""
    model, tokenizer = load_backbone(stories_folder)
    losses = []
    for story in TALES.read_text().split("<|endoftext|>")[:20]:
        input_ids = tokenizer(story, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        losses.append(_loss(model, input_ids))
    assert sum(losses) / 20 == pytest.approx(1.334, abs=0.002)


def _loss(model: torch.nn.Module, input_ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=input_ids, labels=input_ids).loss)


@needs_stories
@needs_tales
def test_tokenizer_agrees_with_sentencepiece(stories_folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    _, tokenizer = load_backbone(stories_folder)
    processor = SentencePieceProcessor(model_file=str(STORIES / "tok512.model"))
    for story in TALES.read_text().split("<|endoftext|>")[:100]:
        text = " ".join(story.split())  # sentencepiece drops repeated spaces; llama2.c and this tokenizer keep them
        assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)]
    odd = "naïve  “quotes” \t 東京 🙂\n\n  end "
    assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd
