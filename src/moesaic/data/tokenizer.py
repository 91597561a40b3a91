"""A byte-level BPE tokenizer trained on the spot, in the form that Hugging Face models use."""

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["END_OF_TEXT", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
PADDING, MASK = "<pad>", "<mask>"

_log = logging.getLogger(__name__)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, max_chars: int | None = 4_000_000, masks: bool = False
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with `vocab_size` tokens (257 or more), trained on the first `max_chars` of `texts`.

    The same texts give the same tokenizer. `<|endoftext|>` is its beginning, end and padding token; with `masks` there
    is `<mask>` too, and padding has a token of its own, because RoBERTa counts no position for it. Any string survives
    encoding and decoding. Texts too small for `vocab_size` merges give fewer tokens, with a warning.

    Raises:
        ValueError: `vocab_size` is below 257, or 259 with `masks`.
    """
    special = [END_OF_TEXT, PADDING, MASK] if masks else [END_OF_TEXT]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {', '.join(special)} need {smallest}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_chars(texts, max_chars), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        _log.warning("the text is too small for %d tokens: %d learned", vocab_size, tokenizer.get_vocab_size())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING if masks else END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **({"mask_token": MASK} if masks else {}),
    )


def _first_chars(texts: Iterable[str], max_chars: int | None) -> Iterator[str]:
    left = max_chars
    for text in texts:
        if left is None:
            yield text
        elif left > 0:
            yield text[:left]
            left -= len(text)
        else:
            return
