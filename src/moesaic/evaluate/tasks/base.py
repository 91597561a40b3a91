"""What a task specification is, and the packaged form: rows of questions that need no hub and no download."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moesaic.config.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.data.corpus import Document

__all__ = ["PackagedTask", "Question", "TaskSpec", "refuse_missing"]

SPLIT = "questions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One multiple-choice row. Each option carries its own leading delimiter; `gold` is the right one's index."""

    id: str
    context: str
    options: tuple[str, ...]
    gold: int


class TaskSpec(ABC):
    """A task that lm-eval can run. Subclasses are frozen dataclasses named by `_target_`."""

    __slots__ = ()

    @property
    def needs_hub(self) -> bool:
        """Whether the task is looked up in lm-eval's own collection, whose data sets come from a hub."""
        return False

    @property
    def task_folder(self) -> Path | None:
        """A local folder of lm-eval task YAMLs that this task needs."""
        return None

    def check(self, path: str) -> None:  # noqa: B027 (most tasks bring all they need)
        """Refuse what cannot run, before a model is loaded; `path` is the config path of this task.

        Raises: ConfigError, with what is missing and how to get it.
        """

    @abstractmethod
    def lm_eval_task(self, name: str, documents: Sequence[Document], *, seed: int) -> str | dict[str, Any]:
        """What lm-eval's `TaskManager` loads: the name of a task, or a task described in place under `name`.

        `documents` are the held-out documents of the corpus.
        """


class PackagedTask(TaskSpec):
    """A multiple-choice task whose questions are made here, from held-out documents or from a local folder."""

    __slots__ = ()
    pmi: ClassVar[bool] = True  # also score the options without the context, which tells likely from fitting

    @abstractmethod
    def questions(self, documents: Sequence[Document], *, seed: int) -> list[Question]:
        """The questions, in an order that depends on nothing but the arguments."""

    def lm_eval_task(self, name: str, documents: Sequence[Document], *, seed: int) -> dict[str, Any]:
        """The task as lm-eval's dictionary; raises ValueError where no question could be made."""
        rows = [asdict(question) for question in self.questions(documents, seed=seed)]
        if not rows:
            raise ValueError(f"task {name}: no question could be made from {len(documents)} held-out documents.")
        metrics = ["acc", "acc_norm", *(["acc_mutual_info"] if self.pmi else [])]
        return {
            "task": name,
            "custom_dataset": lambda **_: _dataset(rows),
            "validation_split": SPLIT,
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_target": "gold",
            "doc_to_choice": "options",
            # lm-eval's default puts a space before every option, which changes what is asked.
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": [{"metric": metric} for metric in metrics],
        }


def refuse_missing(found: bool, path: str, given: Path, wanted: str) -> None:
    """Raise ConfigError unless `found`: `path` is the field's config path, `wanted` says what should be there."""
    if not found:
        state = f"has no {wanted}" if given.exists() else "does not exist"
        raise ConfigError(f"{path}={given} {state}; give the path of {wanted}, or leave this task out.")


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {SPLIT: Dataset.from_list(rows)}
