"""Sparse models as ordinary Hugging Face models: own classes, own model type, everything in config and state dict.

A saved folder loads through `load_model`, and wherever moesaic is installed through
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` (or the class of another head).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from moesaic.config.strict import strict_object, to_plain
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.channels import ChannelMasks, install_masks
from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import AUTO, check_executor
from moesaic.sparse.experts import Experts, ExpertsShape
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.score import Score
from moesaic.sparse.select import Selection

__all__ = [
    "Head",
    "SavedLayer",
    "SavedModel",
    "convert_model",
    "head_of",
    "load_model",
    "mask_channels",
    "sparse_classes",
]

Head = Literal["causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification"]
STUB_NAME = "modeling_moesaic"
_PREFIX = "moesaic_"
_HEADS: dict[Head, tuple[Any, Any]] = {
    "causal_lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked_lm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "seq2seq_lm": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "sequence_classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedLayer:
    """One sparse FFN without its numbers. Raises ValueError where selection and experts do not fit together."""

    experts: ExpertsShape
    score: Score | None
    select: Selection
    combine: Combine
    executor: str = AUTO

    def __post_init__(self) -> None:
        self.select.check(self.experts.num_blocks)
        check_executor(self.executor)

    @classmethod
    def describe(cls, layer: SparseFFN) -> Self:
        """What `layer` is now, its budget included."""
        return cls(
            experts=layer.experts.shape,
            score=None if layer.score is None else layer.score.config,
            select=layer.select,
            combine=layer.combine.config,
            executor=layer.executor,
        )

    def build(self) -> SparseFFN:
        """Such a layer with weights at zero, to load into."""
        dim, num_blocks = self.experts.dim, self.experts.num_blocks
        return SparseFFN(
            Experts(self.experts),
            None if self.score is None else self.score.build(dim, num_blocks),
            self.select,
            self.combine.build(dim, num_blocks),
            executor=self.executor,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """The tree in `config.moesaic`: which dense model this was (`base` is its model type) and its layers in order.

    No layers at all: the FFNs are dense. `channels` masks the inputs of linear layers. `pattern` says where an unknown
    family has its FFNs; `provenance` is free for whoever converted the model.
    """

    base: str
    head: Head
    layers: tuple[SavedLayer, ...]
    channels: ChannelMasks | None = None
    pattern: FFNPattern | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base not in CONFIG_MAPPING:
            raise ValueError(f"base={self.base!r} is no model type of the transformers installed here. Upgrade it.")


class SparseConfigMixin:
    """What the config of every sparse family has beside its dense base: `moesaic`, the tree of a `SavedModel`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: otherwise saving a model that came through the stub would copy this package's source beside it."""


class SparseModelMixin:
    """What the model of every sparse family does differently from its dense base: build, load and save."""

    config: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        saved = _saved_model(config)
        # No second post_init() after this: it would draw the routers afresh.
        if saved.layers:
            _install(self, (layer.build() for layer in saved.layers), saved.pattern)
        if saved.channels is not None:
            install_masks(self, saved.channels)  # type: ignore[arg-type]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing, for the reason given at the config's."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that the folder lacks or has too many are an error, not a warning.

        Raises: ValueError naming the keys.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                keys = sorted(info[kind])
                shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
                raise ValueError(
                    f"{args[0] if args else cls.__name__}: {len(keys)} {kind.replace('_', ' ')} ({shown}). The weights "
                    "do not belong to this config.json, or the file is damaged. Save or convert the model again."
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers; the config tells the layers as they are now, and a stub file serves the Auto classes."""
        saved = _saved_model(self.config)
        layers = tuple(SavedLayer.describe(layer) for layer in sparse_layers(self))  # type: ignore[arg-type]
        self.config.moesaic = to_plain(
            SavedModel(
                base=saved.base,
                head=saved.head,
                layers=layers,
                channels=saved.channels,
                pattern=saved.pattern,
                provenance=saved.provenance,
            )
        )
        config_name, model_name = type(self.config).__name__, type(self).__name__
        auto_class, _ = _HEADS[saved.head]
        self.config.auto_map = {
            "AutoConfig": f"{STUB_NAME}.{config_name}",
            auto_class.__name__: f"{STUB_NAME}.{model_name}",
        }
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / f"{STUB_NAME}.py").write_text(
            "from moesaic.sparse.model import sparse_classes\n\n"
            f'{config_name}, {model_name} = sparse_classes("{saved.base}", "{saved.head}")\n'
        )


@cache
def sparse_classes(base: str, head: Head) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The config and model class of sparse `base` models (a model type of transformers) with that head.

    They are registered, so that Auto classes find them in this process. Raises ValueError for an unknown combination.
    """
    if base not in CONFIG_MAPPING or head not in _HEADS or CONFIG_MAPPING[base] not in _HEADS[head][1]:
        raise ValueError(f"transformers has no {head} model of type {base!r} (heads: {', '.join(_HEADS)}).")
    auto_class, mapping = _HEADS[head]
    config_class = _config_class(base)
    dense_class = mapping[CONFIG_MAPPING[base]]
    model_class = type(
        f"Moesaic{dense_class.__name__}",
        (SparseModelMixin, dense_class),
        {"__module__": __name__, "config_class": config_class, **_kept_in_float32(dense_class)},
    )
    _bind(model_class)
    auto_class.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def convert_model(
    dense_model: PreTrainedModel,
    layers: Iterable[SparseFFN],
    pattern: FFNPattern | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Turn `dense_model` itself into a sparse model: its FFNs are replaced by `layers`, one after the other.

    The dense model is used up, no weight is copied, and each FFN is freed before the next layer is asked for: give a
    generator (or `release` each site when it has been read) and one FFN at a time exists twice.
    Raises ValueError where the number of layers is not that of the FFNs, or for a model with no head that is known.
    """
    base, head = _dense_kind(dense_model)
    sparse_classes(base, head)  # refuses an unknown kind before anything is changed
    _install(dense_model, layers, pattern)
    described = tuple(SavedLayer.describe(layer) for layer in sparse_layers(dense_model))
    saved = SavedModel(base=base, head=head, layers=described, pattern=pattern, provenance=dict(provenance or {}))
    return _with_class(dense_model, saved)


def mask_channels(dense_model: PreTrainedModel, masks: ChannelMasks) -> PreTrainedModel:
    """Turn `dense_model` itself into one whose linear layers see masked inputs; its FFNs stay dense.

    Raises ValueError for a model with no head that is known, AttributeError for a name that is no module.
    """
    base, head = _dense_kind(dense_model)
    install_masks(dense_model, masks)
    return _with_class(dense_model, SavedModel(base=base, head=head, layers=(), channels=masks))


def _dense_kind(model: PreTrainedModel) -> tuple[str, Head]:
    if isinstance(model, SparseModelMixin):
        raise ValueError(f"{type(model).__name__} is sparse already. Convert the dense model that it came from.")
    return model.config.model_type, head_of(model)


def _with_class(dense_model: PreTrainedModel, saved: SavedModel) -> PreTrainedModel:
    """The same object as a model of the sparse classes, its config telling what it is."""
    config_class, model_class = sparse_classes(saved.base, saved.head)
    dense_config = dense_model.config
    config = copy(dense_config)
    config.__class__ = config_class
    config.moesaic = to_plain(saved)
    for module in dense_model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = config  # type: ignore[assignment]
    # Changing the class keeps every tensor, hook and attribute where it is; building a second model would not.
    dense_model.__class__ = model_class
    return dense_model


def load_model(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The sparse model that `save_pretrained` wrote to `folder`, bit for bit; `kwargs` go to `from_pretrained`.

    Raises ValueError for a folder with another kind of model, ConfigError for a damaged config.
    """
    tree = PreTrainedConfig.get_config_dict(str(folder))[0]
    if not isinstance(tree.get("moesaic"), Mapping):
        raise ValueError(
            f"{folder} holds a model of type {tree.get('model_type')!r}, which moesaic did not save. Load it with "
            "transformers, or convert it first."
        )
    saved = strict_object(SavedModel, tree["moesaic"], "moesaic")
    return sparse_classes(saved.base, saved.head)[1].from_pretrained(folder, **kwargs)


@cache
def _config_class(base: str) -> type[PreTrainedConfig]:
    dense_class = CONFIG_MAPPING[base]
    config_class = type(
        f"Moesaic{dense_class.__name__}",
        (SparseConfigMixin, dense_class),
        {
            "__module__": __name__,
            "__annotations__": {"moesaic": dict | None},
            "moesaic": None,
            "model_type": _PREFIX + base,
        },
    )
    _bind(config_class)
    AutoConfig.register(_PREFIX + base, config_class, exist_ok=True)
    return config_class


def _kept_in_float32(dense_class: type[PreTrainedModel]) -> dict[str, list[str]]:
    """Class attributes: which weights loading must not cast. T5 keeps its down matrices (`wo`) in float32."""
    strictly = [*(dense_class._keep_in_fp32_modules_strict or []), r"\.score\.", r"\.combine\.", r"\.select_state\."]
    loosely = list(dense_class._keep_in_fp32_modules or [])
    if "wo" in loosely:
        loosely.append("down_BSD")
    return {"_keep_in_fp32_modules_strict": strictly, "_keep_in_fp32_modules": loosely}


def _bind(made: type) -> None:
    # Pickle looks a class up by module and name.
    setattr(sys.modules[__name__], made.__name__, made)


def head_of(model: PreTrainedModel) -> Head:
    """What `model`, dense or sparse, predicts. Raises ValueError for a model without such a head."""
    if isinstance(model, SparseModelMixin):
        return _saved_model(model.config).head
    for head in get_args(Head):
        mapping = _HEADS[head][1]
        if type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return head
    raise ValueError(
        f"{type(model).__name__} is no causal, masked or seq2seq language model of transformers, and no sequence "
        f"classifier. Load it with {', '.join(auto.__name__ for auto, _ in _HEADS.values())}."
    )


def _install(model: Any, layers: Iterable[SparseFFN], pattern: FFNPattern | None) -> None:
    sites = find_ffns(model, pattern)
    remaining = iter(layers)
    for site in sites:
        layer = next(remaining, None)
        if layer is None:
            raise ValueError(f"{len(sites)} FFNs were found, but only {site.index} sparse layers are given.")
        site.replace(layer.to(layer.experts.up_BSD.device).train(model.training))
    if next(remaining, None) is not None:
        raise ValueError(f"{len(sites)} FFNs were found, but more sparse layers are given.")


def _saved_model(config: PreTrainedConfig) -> SavedModel:
    return strict_object(SavedModel, config.moesaic or {}, "moesaic")
