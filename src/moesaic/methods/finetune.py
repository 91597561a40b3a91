"""Fine-tuning of the dense model before it is cut: what papers that sparsify a task's own model do first.

Source: arXiv:2402.06126 (LTE starts from a model fine-tuned on the task), arXiv:2110.01786 sec. 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.methods.base import AdaptJob, Prepare
from moesaic.methods.lm import LanguageModelling, fit_language_model, train_only
from moesaic.training.fit import FitConfig

__all__ = ["FinetuneDense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDense(Prepare):
    """Train all weights of the dense model on its objective and the adaptation data; gaps count from both models."""

    fit: FitConfig

    def run(self, job: AdaptJob) -> dict[str, Any]:
        trained = train_only(job.model, ("all",), job.pattern)
        job.model.train()
        return fit_language_model(LanguageModelling(job.model, trained, self.fit), job, self.fit, label=job.label)
