"""A model that somebody has trained: a local Hugging Face folder or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.backbones.base import Backbone
from moesaic.backbones.source import AutoClass, DType, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.data.tokens import TokenSplit

__all__ = ["Pretrained"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained(Backbone):
    """`path` is a folder (it wins where it exists) or a hub name; its weights stay where they are.

    `revision` is a branch, tag or commit on the hub. `dtype: auto` is the files' own.
    """

    path: str
    revision: str | None = None
    auto_class: AutoClass = "causal_lm"
    dtype: DType = "auto"

    def fingerprint(self) -> str:
        return self._source().current_fingerprint()

    def skeleton(self) -> PreTrainedModel:
        return self._source().skeleton()

    def materialise(
        self, folder: Path, *, tokens: TokenSplit | None, tokenizer: PreTrainedTokenizerFast | None, seed: int
    ) -> None:
        source = self._source()
        if source.folder is not None:
            pointer = replace(source, path=str(source.folder), fingerprint=source.current_fingerprint())
        else:
            # A branch moves: what later stages load is the commit that is there now.
            commit = getattr(source.config(), "_commit_hash", None)
            pointer = replace(source, revision=commit or self.revision)
        pointer.write(folder)

    def _source(self) -> ModelSource:
        return ModelSource(path=self.path, revision=self.revision, auto_class=self.auto_class, dtype=self.dtype)
