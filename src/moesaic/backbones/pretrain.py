"""A backbone pretrained on the spot from the run's own corpus: real dense weights with no network and no account."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moesaic.backbones.base import Backbone, BackboneError
from moesaic.backbones.source import ARCHITECTURES, AUTO
from moesaic.config.identity import identity
from moesaic.data.objective import ObjectiveBatches, objective_of
from moesaic.training.fit import FitConfig, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.data.tokens import TokenSplit

__all__ = ["PretrainHere", "pretraining"]

_FIT_FOLDER = "pretrain"
_OWN_FIELDS = {"vocab_size": "vocab_size", "max_position_embeddings": "context"}  # config argument: field
_PADDING_ID = 1  # of the tokenizer that is trained for masked language models


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainHere(Backbone):
    """A language model of any architecture, trained on its own objective from random weights.

    `auto_class` is its kind of head, which decides what it predicts (`data.objective`), `architecture` a Hugging Face
    `model_type` and keyword arguments of its config class; vocabulary and context have fields of their own.
    Raises ValueError for a type or an argument that transformers does not know.
    """

    architecture: dict[str, Any]
    vocab_size: int  # of the tokenizer that is trained for it, too
    context: int  # tokens it is trained on at a time, and its longest sequence
    fit: FitConfig
    auto_class: Literal["causal_lm", "seq2seq", "masked_lm"] = "causal_lm"
    initial_seed: int = 0  # of the random weights; the order of the batches follows the seed of `materialise`

    needs_corpus: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        _check_architecture(self.architecture, ARCHITECTURES[self.auto_class], self.auto_class)

    def fingerprint(self) -> str:
        """The identity of its configuration: with the corpus, that is all it is made from."""
        return identity(self)

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return AUTO[self.auto_class].from_config(self._config())

    def materialise(
        self, folder: Path, *, tokens: TokenSplit | None, tokenizer: PreTrainedTokenizerFast | None, seed: int
    ) -> None:
        if tokens is None or tokenizer is None:
            raise BackboneError(f"backbone {self.name} is pretrained here and needs the tokens of a corpus")
        if len(tokenizer) > self.vocab_size:
            raise BackboneError(
                f"the tokenizer has {len(tokenizer)} tokens, but backbone.vocab_size={self.vocab_size}. "
                "Train the tokenizer with that size, or raise it."
            )
        model = self._new_model(tokenizer)
        objective = objective_of(model, tokens)
        batches = ObjectiveBatches(objective, tokens, context=self.context, batch_size=self.fit.batch_size, seed=seed)
        fit_folder = folder / _FIT_FOLDER
        fit(pretraining(model, self.fit), batches, self.fit, folder=fit_folder, label=f"pretrain {self.name}")
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (fit_folder / "last.ckpt").unlink(missing_ok=True)

    def _new_model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        config = self._config()
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self.auto_class == "masked_lm" and tokenizer.pad_token_id != config.pad_token_id:
            raise BackboneError(
                f"the tokenizer pads with token {tokenizer.pad_token_id}, but backbone {self.name} with "
                f"{config.pad_token_id}. Train the tokenizer for masked language models (train_bpe, masks=True)."
            )
        if self.auto_class == "seq2seq":
            config.pad_token_id, config.decoder_start_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.initial_seed)
            model = AUTO[self.auto_class].from_config(config, dtype=torch.float32)
        if self.auto_class == "causal_lm":
            # Not in the config: the embedding of the padding token, which separates documents, would not be trained.
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def _config(self) -> PreTrainedConfig:
        model_type = self.architecture["model_type"]
        config_class: Any = CONFIG_MAPPING[model_type]
        own = {name: getattr(self, field_name) for name, field_name in _own_fields(config_class).items()}
        padding_id = _PADDING_ID if self.auto_class == "masked_lm" else None
        if padding_id is not None and "roberta" in model_type:
            own["max_position_embeddings"] += padding_id + 1  # its positions are counted from there
        options = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": padding_id, **self.architecture, **own}
        options.pop("model_type")
        return config_class(**options)


def pretraining(model: PreTrainedModel, config: FitConfig) -> Any:
    """The Lightning module that trains all weights of `model` on its objective."""
    # Lightning takes seconds to load, and most runs find their backbone cached.
    from moesaic.backbones.pretrain_module import Pretraining

    return Pretraining(model, config)


def _own_fields(config_class: Any) -> dict[str, str]:
    """Those of `_OWN_FIELDS` that the config has: T5 knows no longest sequence."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    return {name: field_name for name, field_name in _OWN_FIELDS.items() if name in known}


def _check_architecture(architecture: Mapping[str, Any], known: Mapping[str, str], auto_class: str) -> None:
    """Hugging Face configs swallow any keyword, so a typo would silently train another model."""
    model_type = str(architecture.get("model_type"))
    if model_type not in known:
        kind = {"causal_lm": "causal", "masked_lm": "masked", "seq2seq": "seq2seq"}[auto_class]
        raise ValueError(
            f"architecture.model_type={model_type!r} is no {kind} language model that transformers knows; did you mean "
            f"{_nearest(model_type, known)!r}? backbone.auto_class says which kind it is."
        )
    config_class = CONFIG_MAPPING[model_type]
    aliases = config_class.attribute_map  # gpt2 says n_positions for max_position_embeddings
    own = _own_fields(config_class)
    own |= {aliases[name]: field_name for name, field_name in own.items() if name in aliases}
    allowed = {field.name for field in fields(config_class)} | set(aliases)
    for key in architecture.keys() - {"model_type"}:
        if key in own:
            raise ValueError(f"architecture.{key} has a field of its own: set {own[key]} instead")
        if key not in allowed:
            nearest = _nearest(key, allowed)
            raise ValueError(f"architecture.{key} is no argument of {config_class.__name__}; did you mean {nearest!r}?")


def _nearest(given: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(given, sorted(names), n=1, cutoff=0.0)[0]
