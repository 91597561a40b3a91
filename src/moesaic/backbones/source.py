"""Where a dense model's weights are, and loading them.

A backbone's folder is either a Hugging Face folder itself or holds one small `backbone.json` that points at one, so
that nobody copies gigabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from moesaic.backbones.base import BackboneError
from moesaic.backbones.files import check_model_folder, folder_fingerprint

__all__ = ["ARCHITECTURES", "AUTO", "POINTER", "AutoClass", "DType", "ModelSource", "load_backbone"]

POINTER = "backbone.json"
AutoClass = Literal["causal_lm", "seq2seq", "masked_lm", "sequence_classification"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

AUTO: dict[AutoClass, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
ARCHITECTURES: dict[AutoClass, Mapping[str, str]] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence_classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
"""The model classes of transformers by model type."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A local folder or a hub name, and how to load it. `fingerprint` is the content it had when it was chosen."""

    path: str
    revision: str | None = None
    auto_class: AutoClass = "causal_lm"
    dtype: DType = "auto"
    fingerprint: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, absolute; None for a hub name. Raises BackboneError for a path that does not exist."""
        local = Path(self.path).expanduser()
        if local.is_dir():
            return local.resolve()
        if local.exists() or not _HUB_NAME.fullmatch(self.path):
            found = "is not a folder" if local.exists() else "does not exist"
            raise BackboneError(
                f"model path {self.path!r} {found} (seen from {Path.cwd()}). "
                "Give a folder with config.json and weights, or a hub name such as 'org/model'."
            )
        return None

    def current_fingerprint(self) -> str:
        """Content hash of a local folder, `name@revision` of a hub model. Raises BackboneError if unreadable."""
        folder = self.folder
        return f"{self.path}@{self.revision or 'main'}" if folder is None else folder_fingerprint(folder)

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises BackboneError if it cannot be read or reached."""
        return self._ask(AutoConfig)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device. Raises BackboneError as `config` does."""
        config = self.config()
        with torch.device("meta"):
            return AUTO[self.auto_class].from_config(config)

    def model(self) -> PreTrainedModel:
        """The model with its weights, in eval mode; peak memory is one copy of them.

        Raises BackboneError if files are missing or corrupt, changed since `fingerprint` was taken, or leave a weight
        of the model without a value.
        """
        self._check_unchanged()
        model, info = self._ask(AUTO[self.auto_class], dtype=self.dtype, output_loading_info=True)
        unset = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if unset:
            raise BackboneError(
                f"{self.path} holds no fitting value for {len(unset)} weights of {type(model).__name__}: "
                f"{', '.join(unset[:5])}. Check auto_class={self.auto_class} and that the files belong to the config."
            )
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises BackboneError if there is none."""
        return self._ask(AutoTokenizer)

    def _check_unchanged(self) -> None:
        folder = self.folder
        if folder is None or self.fingerprint is None:
            return
        check_model_folder(folder)
        found = folder_fingerprint(folder)
        if found != self.fingerprint:
            raise BackboneError(
                f"the model in {folder} has changed since this run began (content {self.fingerprint}, now {found}). "
                "Start the run again, so that it counts as another backbone, or put the old files back."
            )

    def _ask(self, auto: Any, **options: Any) -> Any:
        folder = self.folder
        try:
            if folder is not None:
                return auto.from_pretrained(folder, local_files_only=True, **options)
            return auto.from_pretrained(self.path, revision=self.revision, **options)
        except (OSError, ValueError) as error:
            what = f"{auto.__name__.removeprefix('Auto')} of {self.path}"
            raise BackboneError(f"cannot load {what}: {_first_line(error)} {self._advice()}") from error

    def _advice(self) -> str:
        if self.folder is not None:
            return "The folder needs config.json, weights and tokenizer of a model type that transformers knows."
        return (
            f"{self.path!r} was looked up on the Hugging Face hub (and in its local cache). Without network, copy the "
            "model folder here and set backbone.path to it."
        )

    def write(self, folder: Path) -> None:
        """Leave this source in `folder` as a pointer."""
        (folder / POINTER).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ModelSource:
        """The source that `folder` points at, or `folder` itself with the head that its config names."""
        pointer = folder / POINTER
        if not pointer.is_file():
            return cls(path=str(folder), auto_class=_head_in(folder))
        try:
            return cls(**json.loads(pointer.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BackboneError(f"cannot read {pointer}: {error}. Delete its folder and run again.") from error


def load_backbone(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model and tokenizer that `Backbone.materialise` left in `folder`, or those of any Hugging Face folder.

    Raises BackboneError where something is missing, corrupt or has changed.
    """
    source = ModelSource.read(folder)
    if source.folder is not None:
        check_model_folder(source.folder)
    return source.model(), source.tokenizer()


def _head_in(folder: Path) -> AutoClass:
    """The kind of head that the model in `folder` was saved with; a causal one where its config does not say."""
    config = folder / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    for auto_class, names in ARCHITECTURES.items():
        if saved and saved[0] in names.values():
            return auto_class
    return "causal_lm"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
