import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data.toy import Listed
from transformers import PreTrainedTokenizerFast

from moesaic.data import tokens
from moesaic.data.corpus import DataError
from moesaic.data.tokenizer import train_bpe
from moesaic.data.tokens import TokenDocument, TokenSplit, separator_of, tokenise


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["aaaa"], 257)  # one token per byte: lengths can be counted by hand


def bytes_of(split: TokenSplit, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(split.tokens_of(document).tolist()) for document in split.documents]


def test_table_and_array_agree(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(Listed(texts=("abc", "é", "hello")), "train", tokenizer, tmp_path)
    assert split.documents == (
        TokenDocument("train-0", 0, 3, 3),
        TokenDocument("train-1", 4, 2, 2),
        TokenDocument("train-2", 7, 5, 5),
    )
    assert bytes_of(split, tokenizer) == ["abc", "é", "hello"]
    assert split.tokens_N[[3, 6, 12]].tolist() == [tokenizer.eos_token_id] * 3
    assert (split.num_tokens, split.num_bytes) == (13, 10)
    assert split.tokens_N.dtype == np.uint16
    assert split.separator_id == tokenizer.eos_token_id
    assert split.provenance == {"name": "listed", "fingerprint": "0123456789", "split": "train", "vocab_size": 257}


def test_blocks_cut_across_documents_and_drop_the_rest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenise(Listed(texts=("abc", "é", "hello")), "train", tokenizer, tmp_path)
    blocks_NC = split.blocks(4)
    assert blocks_NC.shape == (3, 4)
    assert blocks_NC.ravel().tolist() == split.tokens_N[:12].tolist()
    assert np.shares_memory(blocks_NC, split.tokens_N)
    assert split.blocks(13).shape == (1, 13)
    with pytest.raises(DataError, match="a block of 14 tokens does not fit a split of 13 tokens"):
        split.blocks(14)


@pytest.mark.parametrize("batch_chars", [1, 10**6])
@pytest.mark.parametrize(
    ("max_tokens", "spelled", "separators"),
    [(1, ["a"], 0), (3, ["abc"], 0), (4, ["abc"], 1), (9, ["abc", "é", "he"], 2), (99, ["abc", "é", "hello"], 3)],
)
def test_cap_counts_separators(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_chars: int,
    max_tokens: int,
    spelled: list[str],
    separators: int,
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARS", batch_chars)
    split = tokenise(Listed(texts=("abc", "é", "hello")), "train", tokenizer, tmp_path, max_tokens=max_tokens)
    assert bytes_of(split, tokenizer) == spelled
    assert split.num_bytes == len("".join(spelled).encode())
    assert (split.tokens_N == tokenizer.eos_token_id).sum() == separators
    assert split.num_tokens == split.num_bytes + separators <= max_tokens


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    big = train_bpe(["a"], 257)
    big.add_tokens([f"<{number}>" for number in range(2**16)])
    split = tokenise(Listed(texts=("<65535>a",)), "train", big, tmp_path)
    assert split.tokens_N.dtype == np.uint32
    assert bytes_of(split, big) == ["<65535>a"]


def test_failure_in_the_middle_leaves_nothing_that_looks_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenise(Listed(texts=("old",)), "train", tokenizer, tmp_path)
    with pytest.raises(OSError, match="gone"):
        tokenise(Listed(texts=("abc", "de"), error=OSError("gone")), "train", tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"no whole token split in .*Delete the folder and run again"):
        TokenSplit.load(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from data.toy import Listed
from moesaic.data import tokens
from moesaic.data.tokenizer import train_bpe

class Killed(Listed):
    def read(self, split):
        yield from Listed.read(self, split)
        os.kill(os.getpid(), signal.SIGKILL)

tokens._BATCH_CHARS = 1
tokens.tokenise(Killed(texts=("abc", "de")), "train", train_bpe(["a"], 257), Path(sys.argv[1]))
"""


def test_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'src'}"}
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin.partial"]
    with pytest.raises(DataError, match="no whole token split"):
        TokenSplit.load(tmp_path)
    assert tokenise(Listed(texts=("abc",)), "train", tokenizer, tmp_path).num_tokens == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.json", "tokens.bin"]


def test_truncated_array_is_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenise(Listed(texts=("abc",)), "train", tokenizer, tmp_path)
    (tmp_path / "tokens.bin").write_bytes(b"\0\0\0")
    with pytest.raises(DataError, match="has 3 bytes instead of 8"):
        TokenSplit.load(tmp_path)


def test_empty_and_impossible_input_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"the heldout split is empty\. Looked at: a list in the test"):
        tokenise(Listed(texts=("",)), "heldout", tokenizer, tmp_path)
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        tokenise(Listed(texts=("a",)), "train", tokenizer, tmp_path, max_tokens=0)


def test_separator_is_what_the_family_has() -> None:
    def with_ids(eos: int | None, sep: int | None, bos: int | None) -> SimpleNamespace:
        return SimpleNamespace(eos_token_id=eos, sep_token_id=sep, bos_token_id=bos)

    assert [separator_of(with_ids(*ids)) for ids in [(0, 1, 2), (None, 1, 2), (None, None, 2)]] == [0, 1, 2]
    with pytest.raises(ValueError, match="no eos, sep or bos token"):
        separator_of(with_ids(None, None, None))
