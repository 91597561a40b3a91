"""A split as tokens: one memory-mapped array of all documents, each followed by a separator, and a table of them.

Shapes: N tokens, C tokens in a block (context).
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moesaic.data.corpus import Corpus, DataError, Document, Split
from moesaic.training.files import replace_whole
from moesaic.training.progress import ProgressLine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenDocument", "TokenSplit", "separator_of", "tokenise"]

_TOKENS, _TABLE = "tokens.bin", "documents.json"
_BATCH_CHARS = 500_000  # enough for the tokenizer's threads, little enough for smooth progress


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """One row of the table: tokens `first_token` ... `first_token + num_tokens - 1` spell `num_bytes` of UTF-8."""

    id: str
    first_token: int
    num_tokens: int  # without the separator that follows
    num_bytes: int
    label: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSplit:
    """A tokenised split. Every document but one cut short by `max_tokens` is followed by `separator_id`.

    `start_id` and `mask_id` are the tokenizer's first token of a sequence ([CLS], beginning of text) and its [MASK].
    """

    tokens_N: np.ndarray  # uint16, or uint32 for vocabularies above 65,536; memory-mapped
    documents: tuple[TokenDocument, ...]
    separator_id: int
    provenance: dict[str, Any]  # corpus, split, vocabulary size
    start_id: int | None = None
    mask_id: int | None = None

    @classmethod
    def load(cls, folder: Path) -> "TokenSplit":
        """The split that `tokenise` left in `folder`.

        Raises:
            DataError: there is none, or it is not whole.
        """
        remedy = "Delete the folder and run again: it is tokenised anew."
        try:
            table = json.loads((folder / _TABLE).read_text(encoding="utf-8"))
            num_tokens, dtype = table["num_tokens"], np.dtype(table["dtype"])
            size = (folder / _TOKENS).stat().st_size
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"no whole token split in {folder} ({error}). {remedy}") from error
        if size != num_tokens * dtype.itemsize:
            raise DataError(f"{folder / _TOKENS} has {size} bytes instead of {num_tokens * dtype.itemsize}. {remedy}")
        return cls(
            tokens_N=np.memmap(folder / _TOKENS, dtype=dtype, mode="r"),
            documents=tuple(TokenDocument(*row) for row in table["documents"]),
            separator_id=table["separator_id"],
            provenance=table["provenance"],
            start_id=table.get("start_id"),
            mask_id=table.get("mask_id"),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens in the array, separators included."""
        return len(self.tokens_N)

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 text in all documents; separators spell none."""
        return sum(document.num_bytes for document in self.documents)

    def blocks(self, context: int) -> np.ndarray:
        """View (N // context, context): the array cut into blocks across document borders; a short rest is left out.

        Raises:
            DataError: not even one block.
        """
        if not 0 < context <= self.num_tokens:
            raise DataError(
                f"a block of {context} tokens does not fit a split of {self.num_tokens} tokens "
                f"({self.provenance.get('name')}, {self.provenance.get('split')}). Use a shorter context or more text."
            )
        count = self.num_tokens // context
        return self.tokens_N[: count * context].reshape(count, context)

    def tokens_of(self, document: TokenDocument) -> np.ndarray:
        """Its tokens (num_tokens,), without the separator."""
        return self.tokens_N[document.first_token : document.first_token + document.num_tokens]


def tokenise(
    corpus: Corpus,
    split: Split,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    max_tokens: int | None = None,
) -> TokenSplit:
    """Tokenise a split of `corpus` into `folder` and load it; at most `max_tokens`, separators included.

    No special tokens are added but the separator. The table is written last: a folder without it holds nothing.

    Raises:
        DataError: from the corpus, or if no document has a token.
        ValueError: `max_tokens` below 1, or the tokenizer has no token to separate documents with.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1, or null for all")
    separator_id = separator_of(tokenizer)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _TABLE).unlink(missing_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(replace_whole(folder / _TOKENS))
        progress = stack.enter_context(ProgressLine(f"tokenise {corpus.name} {split}", max_tokens, unit="tokens"))
        writer = _Writer(file, dtype, separator_id, progress, max_tokens)
        for documents in _batches(corpus.documents(split)):
            writer.write(documents, tokenizer)
            if writer.full:
                break
    if not writer.rows:
        raise DataError(f"data {corpus.name}: no document of the {split} split has a token ({corpus.describe(split)})")
    table = {
        "dtype": dtype.name,
        "num_tokens": writer.num_tokens,
        "separator_id": separator_id,
        "start_id": tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id,
        "mask_id": tokenizer.mask_token_id,
        "provenance": {**corpus.provenance(), "split": split, "vocab_size": vocab_size},
        "documents": writer.rows,
    }
    with replace_whole(folder / _TABLE) as file:
        file.write(json.dumps(table).encode())
    return TokenSplit.load(folder)


def separator_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token put between documents: end of text, or what the family has in its place ([SEP], beginning of text).

    Raises:
        ValueError: it has none of these.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("the tokenizer has no eos, sep or bos token to separate documents with; set its eos_token")


class _Writer:
    """Appends documents to the array until `max_tokens`."""

    def __init__(
        self, file: BinaryIO, dtype: np.dtype, separator_id: int, progress: ProgressLine, max_tokens: int | None
    ) -> None:
        self.rows: list[tuple[str, int, int, int, int | None]] = []
        self.num_tokens = 0
        self._file, self._dtype, self._separator_id = file, dtype, separator_id
        self._progress, self._max_tokens = progress, max_tokens

    @property
    def full(self) -> bool:
        return self._max_tokens is not None and self.num_tokens >= self._max_tokens

    def write(self, documents: list[Document], tokenizer: "PreTrainedTokenizerBase") -> None:
        texts = [document.text for document in documents]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, ids in zip(documents, encoded, strict=True):
            if not ids or self.full:
                continue
            text = document.text
            if self._max_tokens is not None and self.num_tokens + len(ids) > self._max_tokens:
                ids, text = _beginning(document.text, self._max_tokens - self.num_tokens, tokenizer)
            self.rows.append((document.id, self.num_tokens, len(ids), len(text.encode()), document.label))
            self._append([*ids, self._separator_id])
        self._progress.update(self.num_tokens)

    def _append(self, ids: list[int]) -> None:
        room = len(ids) if self._max_tokens is None else self._max_tokens - self.num_tokens
        np.array(ids[:room], dtype=self._dtype).tofile(self._file)
        self.num_tokens += min(len(ids), room)


def _beginning(text: str, num_tokens: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], str]:
    """The first `num_tokens` tokens of `text` and the text they spell."""
    if not tokenizer.is_fast:
        raise ValueError("max_tokens cuts inside a document, which needs a fast tokenizer (with character offsets)")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"][:num_tokens], text[: encoded["offset_mapping"][num_tokens - 1][1]]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
