"""A sequence classifier made on the spot: an encoder that exists, a new head, fine-tuned on the run's labelled corpus.

So the dense reference of a classification is a model that can do the task, as in the papers' GLUE settings.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from moesaic.backbones.base import Backbone, BackboneError
from moesaic.backbones.pretrain import pretraining
from moesaic.backbones.source import load_backbone
from moesaic.config.identity import identity
from moesaic.data.labelled import check_labels
from moesaic.data.objective import ObjectiveBatches, objective_of
from moesaic.sparse.model import head_of
from moesaic.training.fit import FitConfig, fit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.data.tokens import TokenSplit

__all__ = ["Classifier"]

_ENCODER_FOLDER, _FIT_FOLDER = "encoder", "finetune"


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier(Backbone):
    """`encoder`, a masked language model, with a head for `labels`; all its weights are fine-tuned with `fit`.

    `labels` are the corpus's, in its order: `${data.labels}` in YAML. Documents are cut to `context` tokens.
    """

    encoder: Backbone
    labels: tuple[str, ...]
    context: int
    fit: FitConfig
    initial_seed: int = 0  # of the head's random weights; the order of the batches follows the seed of `materialise`

    needs_corpus: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_labels(self.labels)

    def fingerprint(self) -> str:
        """The identity of its configuration and of the encoder's content."""
        return identity([self, self.encoder.fingerprint()])

    def skeleton(self) -> PreTrainedModel:
        encoder = self.encoder.skeleton()
        if head_of(encoder) != "masked_lm":
            raise BackboneError(
                f"backbone.encoder is a {type(encoder).__name__}: a classifier is made from a masked language model "
                "(auto_class: masked_lm), such as roberta_gelu or roberta-base."
            )
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(self._config(encoder))

    def materialise(
        self, folder: Path, *, tokens: TokenSplit | None, tokenizer: PreTrainedTokenizerFast | None, seed: int
    ) -> None:
        if tokens is None or tokenizer is None:
            raise BackboneError(f"backbone {self.name} is fine-tuned here and needs the tokens of a labelled corpus")
        source = folder / _ENCODER_FOLDER
        if not (source / "tokenizer_config.json").exists():  # written last by a pretraining
            source.mkdir(parents=True, exist_ok=True)
            self.encoder.materialise(source, tokens=tokens, tokenizer=tokenizer, seed=seed)
        model = self._with_head(load_backbone(source)[0])
        batches = ObjectiveBatches(
            objective_of(model, tokens), tokens, context=self.context, batch_size=self.fit.batch_size, seed=seed
        )
        fit_folder = folder / _FIT_FOLDER
        fit(pretraining(model, self.fit), batches, self.fit, folder=fit_folder, label=f"fine-tune {self.name}")
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (fit_folder / "last.ckpt").unlink(missing_ok=True)

    def _with_head(self, encoder: PreTrainedModel) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.initial_seed)
            model = AutoModelForSequenceClassification.from_config(self._config(encoder), dtype=torch.float32)
        # BERT's pooler belongs to the head: a masked language model has none.
        missing, unexpected = model.base_model.load_state_dict(encoder.base_model.state_dict(), strict=False)
        if unexpected or any(not name.startswith("pooler.") for name in missing):
            raise BackboneError(
                f"{type(encoder).__name__} and {type(model).__name__} do not share their encoder: "
                f"{', '.join([*missing, *unexpected][:5])}. Use another family."
            )
        return model

    def _config(self, encoder: PreTrainedModel) -> PreTrainedConfig:
        config = deepcopy(encoder.config)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: index for index, label in enumerate(self.labels)}
        return config
