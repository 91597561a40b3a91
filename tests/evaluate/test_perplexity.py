"""Perplexity against a uniform model, a naive loop over tokens, and counts made by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import TOY_CONTEXT, TOY_VOCAB, tiny_model
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.evaluate.perplexity import PerplexityConfig, perplexity
from moesaic.evaluate.questions import windows_of

SEPARATOR = 2


def split_of(*lengths: int, bytes_per_token: int = 3) -> TokenSplit:
    """Documents of random tokens, each followed by the separator."""
    generator = np.random.default_rng(0)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        documents.append(TokenDocument(f"d{number}", len(tokens), length, length * bytes_per_token))
        tokens += [*generator.integers(3, TOY_VOCAB, length).tolist(), SEPARATOR]
    array = np.array(tokens, dtype=np.uint16)
    return TokenSplit(tokens_N=array, documents=tuple(documents), separator_id=SEPARATOR, provenance={"name": "toy"})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def naive(model: PreTrainedModel, split: TokenSplit, context: int, stride: int) -> list[float]:
    """One forward call per token: the token's inputs are those of the first window that covers it."""
    totals = []
    for document in split.documents:
        text = [SEPARATOR, *split.tokens_of(document).tolist()]
        total = 0.0
        for at in range(1, len(text)):
            end = context
            while end < at:
                end += stride
            end = min(end, len(text) - 1)
            begin = max(0, end - context)
            with torch.no_grad():
                logits = model(torch.tensor([text[begin:at]])).logits[0, -1]
            total -= logits.double().log_softmax(-1)[text[at]].item()
        totals.append(total)
    return totals


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_equals_a_loop_over_tokens(model: PreTrainedModel, stride: int) -> None:
    split = split_of(5, 8, 9, 21, 1)
    found = perplexity(model, split, context=8, stride=stride, batch_size=4, start_id=SEPARATOR)
    assert [d.nll_nats for d in found.documents] == pytest.approx(naive(model, split, 8, stride), rel=1e-5)
    assert found.protocol["tokens_counted"] == 44


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    uniform = tiny_model("gpt2")
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    found = perplexity(uniform, split_of(30, 7), context=16, batch_size=8)
    assert found.perplexity == pytest.approx(TOY_VOCAB, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(TOY_VOCAB) / 3, rel=1e-5)


def test_the_batch_size_does_not_matter(model: PreTrainedModel) -> None:
    split = split_of(40, 11, 12, 3, 25)
    one, many = (perplexity(model, split, context=12, stride=6, batch_size=size) for size in (1, 64))
    assert [d.nll_nats for d in one.documents] == pytest.approx([d.nll_nats for d in many.documents], rel=1e-6)
    assert many.protocol["batch_size"] == 64


@pytest.mark.parametrize(("num_tokens", "context", "stride"), [(1, 4, 4), (4, 4, 4), (5, 4, 4), (23, 8, 3), (24, 8, 8)])
def test_windows_score_every_token_once_and_stay_full(num_tokens: int, context: int, stride: int) -> None:
    windows = list(windows_of(0, num_tokens, context, stride))
    scored = [at for w in windows for at in range(w.end - w.scored, w.end)]
    assert scored == list(range(num_tokens))
    assert {w.length for w in windows} == {min(context, num_tokens)}


def test_a_document_cut_short_counts_in_tokens_but_not_in_bytes(model: PreTrainedModel) -> None:
    split = split_of(10, 10, 10)
    found = perplexity(model, split, context=8, batch_size=4, max_tokens=14)
    assert [(d.num_tokens, d.num_bytes) for d in found.documents] == [(10, 30), (4, None)]
    assert found.bits_per_byte == pytest.approx(found.documents[0].nll_nats / math.log(2) / 30)
    assert perplexity(model, split, context=8, batch_size=4, max_tokens=4).bits_per_byte is None


def test_means_are_weighted_by_tokens(model: PreTrainedModel) -> None:
    found = perplexity(model, split_of(30, 2), context=TOY_CONTEXT, batch_size=1)
    assert found.nats_per_token == pytest.approx(sum(d.nll_nats for d in found.documents) / 32)
    assert found.summary()["perplexity"] == pytest.approx(math.exp(found.nats_per_token))
    second = found.documents[1]
    assert found.rows()[1] == {
        "document": "d1", "nll": second.nll_nats, "tokens": 2, "bytes": 6, "window_nll": [second.nll_nats],
        "window_tokens": [2],
    }  # fmt: skip


def test_windows_of_a_document_stand_in_the_order_of_its_text(model: PreTrainedModel) -> None:
    split = split_of(21, 3)
    (first, second) = perplexity(model, split, context=8, stride=3, batch_size=4).rows()
    assert first["window_tokens"] == [8, 3, 3, 3, 3, 1]
    assert second["window_tokens"] == [3]
    # What a document's first windows say does not depend on what follows.
    (cut,) = perplexity(model, split, context=8, stride=3, batch_size=4, max_tokens=14).rows()
    assert cut["window_nll"] == pytest.approx(first["window_nll"][:3])


def test_a_document_begins_as_the_model_expects() -> None:
    split, begins, has_none = split_of(1), tiny_model("llama"), tiny_model("llama", bos_token_id=None)
    told = perplexity(begins, split, context=4, batch_size=1)
    assert told.protocol["first_token"] == "scored, after start token 1"
    assert told.nats_per_token == perplexity(has_none, split, context=4, batch_size=1, start_id=1).nats_per_token
    fallen_back = perplexity(has_none, split, context=4, batch_size=1)
    assert fallen_back.protocol["first_token"] == f"scored, after start token {SEPARATOR}"
    assert fallen_back.nats_per_token != told.nats_per_token


def test_mode_is_restored_and_progress_ends_at_the_total(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    model.train()
    perplexity(model, split_of(9), context=4, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert model.training
    model.eval()
    assert seen == [(2, 3), (3, 3)]


def test_nan_is_an_error_not_a_number() -> None:
    broken = tiny_model("llama")
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        perplexity(broken, split_of(4), context=4, batch_size=1)


def test_more_context_than_the_model_has_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"context=65 exceeds the {TOY_CONTEXT} positions"):
        perplexity(model, split_of(4), context=65, batch_size=1)


@pytest.mark.parametrize("wrong", [{"stride": 9}, {"stride": 0}, {"context": 0}, {"batch_size": 0}, {"max_tokens": 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PerplexityConfig(**{"context": 8, **wrong})
