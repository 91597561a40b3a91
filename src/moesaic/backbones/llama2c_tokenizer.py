"""llama2.c's tokenizers (`tok*.bin`, or the sentencepiece `.model` they were exported from) as Hugging Face tokenizers.

Source: karpathy/llama2.c, tokenizer.py `export` and run.c `encode`: BPE over characters, missing ones as bytes, where
the pair whose joined piece has the best score is merged first.
"""

from __future__ import annotations

import struct
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moesaic.backbones.base import BackboneError

__all__ = ["read_tokenizer"]

_SPACE = "\u2581"
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"
_SPECIAL = (_UNKNOWN, _BEGIN, _END)

Pieces = list[tuple[str, float]]


def read_tokenizer(path: Path, *, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a `.bin` or `.model` file, with `vocab_size` entries. It puts `<s>` before a text.

    `<s>` is also the end of text: llama2.c trains on stories that are separated by it alone, and stops at it.
    Raises BackboneError for a file that is no such tokenizer or has another number of entries.
    """
    pieces = _pieces_of_model(path) if path.suffix == ".model" else _pieces_of_bin(path, vocab_size)
    if len(pieces) != vocab_size:
        raise BackboneError(
            f"{path} has {len(pieces)} tokens, but the checkpoint has {vocab_size}. Give the one it was trained with."
        )
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A $B", special_tokens=[(_BEGIN, vocabulary[_BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        bos_token=_BEGIN,
        eos_token=_BEGIN,
        pad_token=_UNKNOWN,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    score = {piece: value for piece, value in pieces if piece not in _SPECIAL and not _is_byte(piece)}
    found = [
        (-value, index, (piece[:cut], piece[cut:]))
        for index, (piece, value) in enumerate(score.items())
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    return [pair for *_, pair in sorted(found)]


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _pieces_of_model(path: Path) -> Pieces:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BackboneError(f"cannot read {path} as a sentencepiece model: {error}") from error
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]


def _pieces_of_bin(path: Path, vocab_size: int) -> Pieces:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackboneError(
            f"cannot read {path}: {error.strerror}. Give llama2.c's tokenizer .bin or .model."
        ) from error
    pieces: Pieces = []
    offset = 4  # after the longest piece's length
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8 + length
            if not 0 <= length <= len(data) or offset > len(data):
                raise ValueError(f"entry {len(pieces)} of {length} bytes does not fit")
            pieces.append((_piece(data[offset - length : offset].decode(), len(pieces)), score))
    except (struct.error, ValueError) as error:
        raise BackboneError(
            f"{path} ({len(data)} bytes) is no llama2.c tokenizer or is cut off: {error} after {len(pieces)} of "
            f"{vocab_size} tokens. Download or export it again."
        ) from error
    return pieces


def _piece(text: str, index: int) -> str:
    """The sentencepiece spelling; llama2.c's export writes spaces as spaces and puts line ends around `<s>`, `</s>`."""
    return _SPECIAL[index] if index < len(_SPECIAL) else text.replace(" ", _SPACE)
