"""A whole experiment's inputs, tiny: a dense model with its tokenizer, and a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.data.tokenizer import train_bpe

WORDS = tuple("the cat sat on a mat and then the dog ran to the red house by the sea while it was dark".split())  # noqa: SIM905


def story(seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(120))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (a toy Llama and its tokenizer), `train.txt` and `heldout.txt`."""
    folder = tmp_path_factory.mktemp("inputs")
    train, heldout = ("\n\n".join(story(seed) for seed in seeds) for seeds in (range(60), range(60, 75)))
    (folder / "train.txt").write_text(train)
    (folder / "heldout.txt").write_text(heldout)
    tokenizer = train_bpe([train], vocab_size=300)
    # Six layers of 64 neurons: what the shipped numbers of blocks and layers fit.
    sizes = {"vocab_size": 300, "intermediate_size": 64, "num_hidden_layers": 6}
    config = AutoConfig.for_model(**{**tiny_model("llama").config.to_dict(), **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def overrides(inputs: Path, tmp_path: Path) -> list[str]:
    """What makes any experiment run on `inputs` in a second or two."""
    return [
        "backbone=hf",
        f"backbone.path={inputs / 'model'}",
        "data=text",
        f"data.train={inputs / 'train.txt'}",
        f"data.heldout={inputs / 'heldout.txt'}",
        "debug=smoke",
        f"paths.runs={tmp_path / 'runs'}",
    ]
