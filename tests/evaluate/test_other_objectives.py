"""Held-out loss of models that are not causal, against loops that ask one thing at a time."""

import math

import numpy as np
import pytest
import torch
from toys import TOY_LABELS, TOY_VOCAB, tiny_model
from transformers import PreTrainedModel

from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.evaluate.items import summarise
from moesaic.evaluate.perplexity import perplexity

SEPARATOR, START, MASK = 2, 1, 63


def split_of(*lengths: int) -> TokenSplit:
    generator = np.random.default_rng(0)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        documents.append(TokenDocument(f"d{number}", len(tokens), length, 3 * length, number % TOY_LABELS))
        tokens += [*generator.integers(3, MASK, length).tolist(), SEPARATOR]
    array = np.array(tokens, dtype=np.uint16)
    settings = {"separator_id": SEPARATOR, "start_id": START, "mask_id": MASK}
    return TokenSplit(tokens_N=array, documents=tuple(documents), provenance={"name": "toy"}, **settings)


def log_probs(model: PreTrainedModel, **inputs: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0].double().log_softmax(-1)


def test_the_decoder_is_asked_for_the_second_half_of_every_window() -> None:
    model, split = tiny_model("t5"), split_of(5, 8, 21, 1)
    found = perplexity(model, split, context=8, batch_size=3)
    for document, told in zip(split.documents, found.documents, strict=True):
        text = [SEPARATOR, *split.tokens_of(document).astype(int).tolist()]
        nll, scored_to, count = 0.0, 0, 0
        while scored_to < document.num_tokens:
            end = min(scored_to + 7, document.num_tokens)
            window = text[max(0, end - 7) : end + 1]
            first, second = window[: len(window) // 2], window[len(window) // 2 :]
            logits = log_probs(model, input_ids=first, decoder_input_ids=[0, *second[:-1]])
            new = min(len(second), end - scored_to)
            nll -= sum(logits[at, second[at]].item() for at in range(len(second) - new, len(second)))
            scored_to, count = end, count + new
        assert told.nll_nats == pytest.approx(nll, rel=1e-5)
        assert (told.num_tokens, told.num_bytes) == (count, None)
    assert found.bits_per_byte is None
    assert found.protocol["objective"] == "second_half"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_masked_tokens_are_the_same_every_time_and_lost_from_the_input(family: str) -> None:
    model, split = tiny_model(family), split_of(5, 8, 40, 1)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    found = perplexity(model, split, context=16, batch_size=1)
    handle.remove()
    again = perplexity(model, split, context=16, batch_size=5)
    assert [d.nll_nats for d in again.documents] == pytest.approx([d.nll_nats for d in found.documents], rel=1e-6)
    nll = {document.id: 0.0 for document in split.documents}
    hidden = dict.fromkeys(nll, 0)
    for ids in seen:
        window = ids[0].tolist()
        assert len(window) <= 16
        assert window[0] == START
        for document in split.documents:
            text = [START, *split.tokens_of(document).astype(int).tolist()]
            places = [
                at
                for at in range(len(text) - len(window) + 1)
                if all(own in (MASK, there) for own, there in zip(window[1:], text[at + 1 :], strict=False))
            ]
            if not places or (len(window) < 16 and len(window) != len(text)):
                continue
            answer = log_probs(model, input_ids=window)
            for at in range(1, len(window)):
                if window[at] == MASK:
                    nll[document.id] -= answer[at, text[places[0] + at]].item()
                    hidden[document.id] += 1
            break
    assert {d.id: d.num_tokens for d in found.documents} == hidden
    assert hidden == {"d0": 1, "d1": 1, "d2": 6, "d3": 1}  # 15 % of 15, of 15, and of the 10 new ones at the end
    assert {d.id: d.nll_nats for d in found.documents} == pytest.approx(nll, rel=1e-5)
    assert found.protocol["tokens_counted"] == 9


@pytest.mark.parametrize("family", ["bert_classifier", "roberta_classifier"])
def test_a_classifier_is_asked_for_the_label_of_each_document(family: str) -> None:
    model, split = tiny_model(family), split_of(5, 8, 40, 1, 8)
    found = perplexity(model, split, context=16, batch_size=2)
    right = 0
    for document, told, item in zip(split.documents, found.documents, found.items, strict=True):
        text = split.tokens_of(document).astype(int).tolist()[:14]
        answer = log_probs(model, input_ids=[START, *text, SEPARATOR])
        assert told.nll_nats == pytest.approx(-answer[document.label].item(), rel=1e-5)
        assert (told.num_tokens, item.gold) == (1, document.label)
        assert item.option_loglik == pytest.approx(answer.tolist(), rel=1e-5)
        right += int(answer.argmax()) == document.label
    assert summarise(found.items)["acc"] == right / 5
    assert summarise(found.items)["gold_nll"] == pytest.approx(found.nats_per_token)
    assert found.protocol["objective"] == "classification"


def test_models_that_know_nothing_have_the_number_of_choices_as_perplexity() -> None:
    masked, classifier = tiny_model("bert"), tiny_model("roberta_classifier")
    for linear in (masked.get_output_embeddings(), classifier.classifier.out_proj):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    assert perplexity(masked, split_of(30), context=16, batch_size=2).perplexity == pytest.approx(TOY_VOCAB)
    assert perplexity(classifier, split_of(30, 4), context=16, batch_size=2).perplexity == pytest.approx(TOY_LABELS)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_one_token_of_context_leaves_nothing_to_predict_from(family: str) -> None:
    with pytest.raises(ValueError, match=r"context=1 leaves .* nothing to predict from"):
        perplexity(tiny_model(family), split_of(4), context=1, batch_size=1)


def test_nan_is_an_error_for_a_classifier_too() -> None:
    broken = tiny_model("bert_classifier")
    broken.classifier.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        perplexity(broken, split_of(4), context=8, batch_size=1)
