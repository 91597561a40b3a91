"""What a backbone is: a dense Hugging Face model that something can be converted from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moesaic.ffn.families import FFNPattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.data.tokens import TokenSplit

__all__ = ["Backbone", "BackboneError"]


class BackboneError(ValueError):
    """A dense model that cannot be read, reached or made; the message names it and says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone(ABC):
    """A dense model by name. `ffn` says where its FFNs are, for a family that is not built in."""

    name: str
    ffn: FFNPattern | None = None

    needs_corpus: ClassVar[bool] = False  # True: it is trained here, so `materialise` wants tokens and a tokenizer

    @abstractmethod
    def fingerprint(self) -> str:
        """What the model is made from, told by content: it changes when the weights would.

        Reads a few megabytes at most. Raises BackboneError where the source cannot be read.
        """

    @abstractmethod
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: all shapes, no weights. To refuse what cannot fit before any work is done.

        Raises BackboneError where the source cannot be read.
        """

    @abstractmethod
    def materialise(
        self, folder: Path, *, tokens: TokenSplit | None, tokenizer: PreTrainedTokenizerFast | None, seed: int
    ) -> None:
        """Write to `folder` what `load_backbone` reads: a Hugging Face folder, or a pointer to one that exists.

        `tokens` and `tokenizer` are given where `needs_corpus`, and `seed` orders them. An interrupted call leaves a
        folder in which the same call goes on. Raises BackboneError where the source cannot be read.
        """
