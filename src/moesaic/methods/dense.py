"""The dense controls: the backbone as it is, and the backbone trained on exactly the tokens the sparse models see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from moesaic.methods.base import ConvertJob, Method

__all__ = ["Dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense(Method):
    """No conversion. With a fine-tuning phase it is `dense_same_tokens`, the comparison that tells method from data."""

    converts: ClassVar[bool] = False

    def convert(self, job: ConvertJob) -> PreTrainedModel:
        return job.model
