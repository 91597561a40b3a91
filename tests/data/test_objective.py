"""What models are trained on, against the same thing written as a loop over tokens."""

import numpy as np
import pytest
import torch
from toys import TOY_LABELS, TOY_VOCAB, tiny_model
from transformers import PreTrainedModel

from moesaic.data.corpus import DataError
from moesaic.data.objective import (
    NOT_SCORED,
    Classification,
    MaskedToken,
    NextToken,
    ObjectiveBatches,
    SecondHalf,
    forward,
    objective_of,
    positions_of,
)
from moesaic.data.tokens import TokenDocument, TokenSplit
from moesaic.methods.lm import task_loss

SEPARATOR, START, MASK = 2, 1, 63
CONTEXT = 16


def split_of(*lengths: int, **changes: int | None) -> TokenSplit:
    """Documents of random tokens, each followed by the separator; labels go round."""
    generator = np.random.default_rng(0)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        documents.append(TokenDocument(f"d{number}", len(tokens), length, length, number % TOY_LABELS))
        tokens += [*generator.integers(3, MASK, length).tolist(), SEPARATOR]
    settings = {"separator_id": SEPARATOR, "start_id": START, "mask_id": MASK, **changes}
    return TokenSplit(
        tokens_N=np.array(tokens, dtype=np.uint16), documents=tuple(documents), provenance={"name": "toy"}, **settings
    )


def batches_of(model: PreTrainedModel, split: TokenSplit, *, seed: int = 0, batch_size: int = 4) -> ObjectiveBatches:
    return ObjectiveBatches(objective_of(model, split), split, context=CONTEXT, batch_size=batch_size, seed=seed)


def loss_and_batch(family: str) -> tuple[PreTrainedModel, float, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    batch = batches_of(model, split_of(100, 100)).batch(3)
    with torch.no_grad():
        return model, task_loss(model, batch).item(), batch


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", NextToken),
        ("bert", MaskedToken),
        ("roberta", MaskedToken),
        ("t5", SecondHalf),
        ("roberta_classifier", Classification),
    ],
)
def test_the_head_says_what_is_predicted(family: str, kind: type) -> None:
    assert type(objective_of(tiny_model(family), split_of(20))) is kind


def test_next_tokens_are_as_the_model_itself_counts_them() -> None:
    model, loss, batch = loss_and_batch("llama")
    assert batch.keys() == {"input_ids"}
    total = 0.0
    for row in batch["input_ids"]:
        for at in range(1, CONTEXT):
            total -= model(row[None, :at]).logits[0, -1].log_softmax(-1)[row[at]].item()
    assert loss == pytest.approx(total / (4 * (CONTEXT - 1)), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_masked_tokens_are_predicted_from_all_others(family: str) -> None:
    model, loss, batch = loss_and_batch(family)
    split = split_of(100, 100)
    rows = {tuple(row[1:]) for row in split.blocks(CONTEXT).astype(int).tolist()}
    nll = []
    for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        hidden = (inputs == MASK).nonzero().flatten().tolist()
        assert len(hidden) == 2  # 15 % of 15
        assert inputs[0] == START
        assert (labels != NOT_SCORED).nonzero().flatten().tolist() == hidden
        whole = inputs.clone()
        whole[hidden] = labels[hidden]
        assert tuple(whole[1:].tolist()) in rows
        nll += [-model(inputs[None]).logits[0, at].log_softmax(-1)[labels[at]].item() for at in hidden]
    assert loss == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_the_decoder_predicts_the_second_half_from_the_first() -> None:
    model, loss, batch = loss_and_batch("t5")
    split = split_of(100, 100)
    rows = {tuple(row) for row in split.blocks(CONTEXT).astype(int).tolist()}
    total = 0.0
    for first, second in zip(batch["input_ids"], batch["labels"], strict=True):
        assert (*first.tolist(), *second.tolist()) in rows
        for at in range(CONTEXT // 2):
            given = torch.cat([torch.tensor([model.config.decoder_start_token_id]), second[:at]])
            logits = model(input_ids=first[None], decoder_input_ids=given[None]).logits
            total -= logits[0, -1].log_softmax(-1)[second[at]].item()
    assert loss == pytest.approx(total / (4 * CONTEXT // 2), rel=1e-4)


@pytest.mark.parametrize("family", ["bert_classifier", "roberta_classifier"])
def test_a_classifier_is_trained_on_framed_documents_as_if_nothing_was_padded(family: str) -> None:
    model = tiny_model(family)
    split = split_of(3, 9, 5, 40)
    batch = batches_of(model, split).batch(0)
    assert batch["input_ids"].shape == (4, CONTEXT)
    expected, seen = [], set()
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (CONTEXT - length)
        index = {5: 0, 11: 1, 7: 2, CONTEXT: 3}[length]
        text = split.tokens_of(split.documents[index])[: CONTEXT - 2].astype(int).tolist()
        assert ids[:length].tolist() == [START, *text, SEPARATOR]
        assert label == split.documents[index].label
        expected.append(-model(ids[None, :length]).logits[0].log_softmax(-1)[label].item())
        seen.add(index)
    assert seen == {0, 1, 2, 3}
    with torch.no_grad():
        assert task_loss(model, batch).item() == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_a_batch_is_no_longer_than_its_longest_document() -> None:
    batch = batches_of(tiny_model("bert_classifier"), split_of(3, 4), batch_size=2).batch(0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "roberta_classifier"])
def test_a_batch_depends_on_seed_and_number_alone(family: str) -> None:
    model, split = tiny_model(family), split_of(100, 60, 5, 9, 20, 33, 7)
    straight, resumed = batches_of(model, split), batches_of(model, split)
    for index in range(5):
        straight.batch(index)
    resumed.load_state_dict({"position": 5})
    for one, other in ((straight.batch(5), next(iter(resumed))), (straight.batch(5), straight.batch(5))):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = batches_of(model, split, seed=1).batch(5)
    assert any(not torch.equal(other_seed[name], straight.batch(5)[name]) for name in other_seed)


def test_a_row_is_masked_elsewhere_on_its_next_pass() -> None:
    batches = batches_of(tiny_model("bert"), split_of(CONTEXT - 1), batch_size=1)
    assert batches.num_rows == 1
    masked = {tuple((batches.batch(index)["input_ids"] == MASK)[0].tolist()) for index in range(20)}
    assert len(masked) > 10


def test_both_stacks_of_an_encoder_decoder_see_equally_many_tokens() -> None:
    model, split = tiny_model("t5"), split_of(100)
    objective = objective_of(model, split)
    assert objective.tokens_per_row(objective.columns(split, CONTEXT)) == CONTEXT / 2
    with pytest.raises(DataError, match="context=15 has no two equal halves"):
        objective.columns(split, 15)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "bert_classifier"])
def test_one_call_serves_every_family(family: str) -> None:
    model, _, batch = loss_and_batch(family)
    width = TOY_LABELS if family.endswith("classifier") else TOY_VOCAB
    assert forward(model, batch).logits.shape[-1] == width


def test_what_an_objective_needs_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"its tokenizer has no \[MASK\]"):
        objective_of(tiny_model("bert"), split_of(9, mask_id=None))
    with pytest.raises(ValueError, match="names no decoder_start_token_id"):
        objective_of(tiny_model("t5", decoder_start_token_id=None), split_of(9))
    classifier = objective_of(tiny_model("bert_classifier", num_labels=2), split_of(9, 9, 9))
    with pytest.raises(DataError, match=r"document d2 of toy has label 2, but the model tells classes 0\.\.1 apart"):
        classifier.columns(split_of(9, 9, 9), CONTEXT)


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 65), ("t5", None), ("llama", 64)])
def test_positions_are_those_that_a_sequence_can_fill(family: str, positions: int | None) -> None:
    model = tiny_model(family)
    assert positions_of(model.config) == positions
    if positions is not None and family != "llama":  # rotary positions have no end
        model(torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))
