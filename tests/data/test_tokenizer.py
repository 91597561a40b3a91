import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moesaic.data.tokenizer import END_OF_TEXT, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n", "class A:\n    def f(self):\n        return self.x\n"] * 5


def test_any_string_survives() -> None:
    tokenizer = train_bpe(TEXTS, 280)
    for text in ("def f(x):\n\n        return  x", "é🙂\x00\t ,  .", " leading and trailing  "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 280


def test_same_texts_give_the_same_tokenizer() -> None:
    one, other = (train_bpe(TEXTS, 320).backend_tokenizer.to_str() for _ in range(2))
    assert one == other


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 280)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id,) * 3


def test_only_the_first_characters_count() -> None:
    assert train_bpe(["aaaa", "bbbb" * 50], 258, max_chars=4).get_vocab().keys() >= {"aa"}
    assert train_bpe(["aaaa", "bbbb" * 50], 258, max_chars=None).get_vocab().keys() >= {"bb"}


def test_sizes(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 is too small"):
        train_bpe(TEXTS, 256)
    with caplog.at_level(logging.WARNING):
        assert len(train_bpe(["ab"], 400)) == 258
    assert "too small for 400 tokens: 258 learned" in caplog.text
