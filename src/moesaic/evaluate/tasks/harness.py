"""Any task that lm-eval knows by name: from its own collection, or from a local folder of task YAMLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.evaluate.tasks.base import TaskSpec, refuse_missing

if TYPE_CHECKING:
    from moesaic.data.corpus import Document

__all__ = ["HarnessTask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTask(TaskSpec):
    """The lm-eval task or group `task`. Without `include_path` it is looked up in lm-eval's collection (needs a hub).

    `include_path` is a local folder of task YAMLs; `num_fewshot` None leaves the task's own number.
    """

    task: str
    include_path: Path | None = None
    num_fewshot: int | None = None

    @property
    def needs_hub(self) -> bool:
        return self.include_path is None

    @property
    def task_folder(self) -> Path | None:
        return self.include_path

    def check(self, path: str) -> None:
        if self.include_path is not None:
            found = any(self.include_path.rglob("*.yaml"))
            refuse_missing(found, f"{path}.include_path", self.include_path, "lm-eval task YAMLs (*.yaml)")

    def lm_eval_task(self, name: str, documents: Sequence[Document], *, seed: int) -> str | dict[str, Any]:
        if self.num_fewshot is None:
            return self.task
        return {"task": self.task, "num_fewshot": self.num_fewshot}
