"""Labelled corpora: what an example is, who is held out, and what a split keeps of it."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from data.toy import Listed

from moesaic.data.corpus import DataError
from moesaic.data.labelled import LabelledJsonl, LineOrder, SentencePairs
from moesaic.data.tokenizer import MASK, train_bpe
from moesaic.data.tokens import TokenSplit, tokenise


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(folder: Path, rows: list[dict]) -> LabelledJsonl:
    path = jsonl(folder / "rows.jsonl", rows)
    return LabelledJsonl(name="toy", train=path, heldout=path, labels=("0", "1"))


def test_classes_are_told_by_their_text_whatever_its_type(tmp_path: Path) -> None:
    corpus = labelled(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": "0"}])
    assert [(d.text, d.label) for d in corpus.documents("train")] == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 2}, r"rows.jsonl:1: 'label' is '2', which is none of data.labels: 0, 1"),
        ({"text": "a", "lable": 1}, r"rows.jsonl:1: no key 'label'; did you mean 'lable'"),
    ],
)
def test_a_row_without_a_known_class_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(labelled(tmp_path, [row]).documents("train"))


@pytest.mark.parametrize("labels", [("yes",), ("yes", "yes")])
def test_one_class_is_none(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least two different classes"):
        LabelledJsonl(name="toy", train=Path("a"), heldout=Path("a"), labels=labels)


def test_half_of_the_stretches_have_their_halves_exchanged() -> None:
    texts = tuple("\n\n".join(f"{document}:{line}" for line in range(50)) for document in range(20))
    corpus = LineOrder(name="order", text=Listed(texts=texts), lines=4)
    examples = list(corpus.documents("train"))
    assert len(examples) == 20 * (50 // 4)
    for example in examples:
        numbers = [int(line.partition(":")[2]) for line in example.text.splitlines()]
        first = min(numbers)
        in_order = [first, first + 1, first + 2, first + 3]
        assert first % 4 == 0
        assert numbers == (in_order if example.label else in_order[2:] + in_order[:2])
    assert 0.4 < sum(example.label or 0 for example in examples) / len(examples) < 0.6
    assert examples == list(corpus.documents("train"))


def test_stretches_need_two_halves() -> None:
    with pytest.raises(ValueError, match="lines=3 has no two equal halves"):
        LineOrder(name="order", text=Listed(texts=("a",)), lines=3)


def test_pairs_are_held_out_whole_and_the_classes_are_equally_many(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = [{"sentence_good": f"{name} {i} is", "sentence_bad": f"{name} {i} are"} for i in range(100)]
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    corpus = SentencePairs(name="pairs", folder=tmp_path, heldout_frac=0.2)
    sides = [{d.text.rpartition(" ")[0]: d.id for d in corpus.documents(split)} for split in ("train", "heldout")]
    assert not sides[0].keys() & sides[1].keys()
    assert len(sides[0]) + len(sides[1]) == 200
    assert 20 < len(sides[1]) < 60
    held = list(corpus.documents("heldout"))
    assert Counter(d.label for d in held) == {0: len(held) // 2, 1: len(held) // 2}
    assert all((d.label == 1) == d.text.endswith("is") for d in held)
    assert {d.label for d in held[:8]} == {0, 1}
    with pytest.raises(DataError, match=r"has no .* files of sentence pairs"):
        SentencePairs(name="pairs", folder=tmp_path / "nowhere").fingerprint()


def test_a_split_keeps_labels_and_special_tokens(tmp_path: Path) -> None:
    corpus = labelled(tmp_path, [{"text": "ab", "label": 1}, {"text": "c", "label": 0}])
    tokenizer = train_bpe(["ab"], 259, masks=True)
    split = tokenise(corpus, "train", tokenizer, tmp_path / "tokens")
    assert [document.label for document in split.documents] == [1, 0]
    assert split.mask_id == tokenizer.convert_tokens_to_ids(MASK)
    assert split.start_id == split.separator_id == tokenizer.bos_token_id
    assert tokenizer.pad_token_id not in (split.separator_id, split.mask_id)
    plain = tokenise(Listed(texts=("a",)), "train", train_bpe(["a"], 257), tmp_path / "plain")
    assert (plain.mask_id, plain.documents[0].label) == (None, None)
    assert TokenSplit.load(tmp_path / "plain").documents == plain.documents
