"""A real pretrained model, cut into experts: with all blocks active it must say what the dense one says."""

from pathlib import Path

import pytest
import torch
from shared_data import SHARED
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.backbones.llama2c import Llama2c
from moesaic.backbones.source import load_backbone
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import AUTO, EXECUTORS
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, set_executor
from moesaic.sparse.model import convert_model, load_model
from moesaic.sparse.select import AllBlocks

STORIES = SHARED / "data" / "stories260k"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES} (MOESAIC_SHARED): the 260k model")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The 260k model in 4 random blocks of 43 neurons, all active, saved and loaded again."""
    folder = tmp_path_factory.mktemp("stories")
    backbone = Llama2c(name="stories260k", checkpoint=STORIES / "stories260K.bin", tokenizer=STORIES / "tok512.bin")
    backbone.materialise(folder, tokens=None, tokenizer=None, seed=0)
    model, tokenizer = load_backbone(folder)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for site in find_ffns(model):
        ffn = site.read()
        experts = Experts.from_dense(ffn, torch.randperm(ffn.width, generator=generator) % 4)
        layers.append(SparseFFN(experts, None, AllBlocks(), Combine().build(ffn.dim, 4)))
    convert_model(model, layers).save_pretrained(folder / "sparse")
    return load_model(folder / "sparse"), tokenizer


@pytest.mark.parametrize("executor", [AUTO, *EXECUTORS])
def test_every_executor_decodes_the_published_text(
    sparse: tuple[PreTrainedModel, PreTrainedTokenizerBase], executor: str
) -> None:
    model, tokenizer = sparse
    set_executor(model, executor)
    tokens = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0]
    expected = Path(STORIES / "expected_greedy_200_steps.txt").read_text()
    assert tokenizer.decode(tokens, skip_special_tokens=True) == expected
