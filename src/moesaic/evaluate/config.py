"""What quality is measured by."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesaic.evaluate.cett import CettConfig
from moesaic.evaluate.perplexity import PerplexityConfig
from moesaic.evaluate.tasks.base import TaskSpec

__all__ = ["EvaluateConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Perplexity on the held-out split, and tasks, named by their keys.

    `batch_size` and `limit` (items per task, None: all) are lm-eval's. `cett`: how many neurons could be left out at a
    set price in perplexity (None: not measured; causal language models only).
    """

    perplexity: PerplexityConfig
    tasks: dict[str, TaskSpec] = field(default_factory=dict)
    batch_size: int = 32
    limit: int | None = None
    cett: CettConfig | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def check(self, path: str = "evaluate") -> None:
        """Refuse missing task data before a model is loaded. Raises: ConfigError."""
        for name, task in self.tasks.items():
            task.check(f"{path}.tasks.{name}")
