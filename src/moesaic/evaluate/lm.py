"""lm-eval's wrapper for an in-memory Hugging Face model, with progress and errors of our own. Imports lm-eval: slow."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.evaluate.progress import Progress

__all__ = ["InMemoryLM"]

Request = tuple[tuple[str, str], list[int], list[int]]


class InMemoryLM(HFLM):
    """`HFLM` on a model that is already here. `truncated` counts requests whose context was cut from the left."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, progress: Progress | None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.truncated = 0
        self._progress, self._done, self._total = progress, 0, 0

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for (_, option), context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"an option of {len(continuation)} tokens cannot be scored by a model with a context of "
                    f"{self.max_length}: {option[:80]!r}. Leave the task out, or use a model with a longer context."
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        self._done, self._total = 0, len(requests)
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if self._progress is not None:
            self._progress(self._total, self._total)
        return answers

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._done += inps.shape[0]
        if self._progress is not None and self._done < self._total:
            self._progress(self._done, self._total)
        return logits
