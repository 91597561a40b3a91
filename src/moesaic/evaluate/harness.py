"""Run lm-eval tasks on a model that is in memory, quietly, and keep what every item's options scored."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest import mock

from moesaic.config.errors import did_you_mean
from moesaic.evaluate.batching import independent_batch_size
from moesaic.evaluate.items import Item, summarise
from moesaic.evaluate.progress import Progress
from moesaic.evaluate.tasks.base import TaskSpec
from moesaic.training.randomness import own_randomness

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesaic.data.corpus import Document

__all__ = ["TaskResult", "run_tasks"]

NOISY_LOGGERS = ("lm_eval", "datasets", "transformers.tokenization_utils_base")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The answers to one task. `items` is empty where a task is not a choice between options.

    `metrics` are lm-eval's own (without its error bars), `protocol` says how they came about.
    """

    name: str
    items: tuple[Item, ...]
    metrics: dict[str, float]
    protocol: dict[str, Any]

    def summary(self, dense: Sequence[Item] | None = None) -> dict[str, float | int]:
        """The derived means, and lm-eval's metrics that say something else; `dense` are the dense model's items."""
        if not self.items:
            return {**self.metrics}
        # acc_pmi is lm-eval's acc_mutual_info.
        others = {name: value for name, value in self.metrics.items() if name != "acc_mutual_info"}
        return {**others, **summarise(self.items, dense)}

    def rows(self) -> list[dict[str, Any]]:
        """One row per item, for `items.parquet`."""
        return [{"task": self.name, **item.row()} for item in self.items]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskSpec],
    *,
    documents: Sequence[Document] = (),
    batch_size: int,
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Every task's result, by lm-eval's name for it (a named group brings one entry per member, and its own).

    `documents` are the held-out documents, `limit` the number of items per task (None: all), `progress` counts the
    requests. The model's train or eval mode is restored and no random state changes.

    Raises: ValueError for an unknown task or an option that cannot be scored, RuntimeError where a task's data cannot
    be had, FloatingPointError where the model gives NaN.
    """
    if not tasks:
        return {}
    batch_size = independent_batch_size(model, batch_size)
    was_training = model.training
    try:
        offline = not any(spec.needs_hub for spec in tasks.values())
        with own_randomness(seed), _offline(offline), _quiet(progress) as progress:
            results, truncated = _simple_evaluate(
                model, tokenizer, tasks, documents, batch_size=batch_size, seed=seed, limit=limit, progress=progress
            )
    finally:
        model.train(was_training)
    protocol = {
        "harness": f"lm-eval {results['lm_eval_version']}",
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "limit": limit,
        "truncated_requests": truncated,
    }
    return {name: _result(name, results, protocol) for name in results["results"]}


def _simple_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskSpec],
    documents: Sequence[Document],
    *,
    batch_size: int,
    seed: int,
    limit: int | None,
    progress: Progress | None,
) -> tuple[dict[str, Any], int]:
    from lm_eval import evaluator

    from moesaic.evaluate.lm import InMemoryLM

    lm = InMemoryLM(model, tokenizer, batch_size=batch_size, progress=progress)
    loadable = [spec.lm_eval_task(name, documents, seed=seed) for name, spec in tasks.items()]
    manager = _task_manager(tasks.values(), loadable)
    # It would describe the machine on every call (1 s, and git's complaints); our records do that once.
    with mock.patch.multiple(evaluator, add_env_info=lambda _: None, get_git_commit_hash=lambda: None):
        try:
            results = evaluator.simple_evaluate(
                lm,
                tasks=loadable,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=seed,
            )
        except OSError as error:
            raise RuntimeError(
                f"the data of {', '.join(tasks)} could not be read or fetched: {error}. Offline, use the packaged "
                "tasks (next_line, story_ending, blimp) or a local folder of task YAMLs (include_path)."
            ) from error
    return {**results, "lm_eval_version": version("lm_eval")}, lm.truncated


def _task_manager(specs: Collection[TaskSpec], loadable: Sequence[str | dict[str, Any]]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    folders = sorted({str(spec.task_folder) for spec in specs if spec.task_folder is not None})
    manager = TaskManager(include_path=folders or None, include_defaults=any(spec.needs_hub for spec in specs))
    for task in loadable:
        name = task if isinstance(task, str) else task["task"]
        described_here = isinstance(task, dict) and "custom_dataset" in task
        if not described_here and name not in manager.all_tasks:
            raise ValueError(
                f"lm-eval knows no task {name!r}{did_you_mean(name, manager.all_tasks) or '.'} "
                "`lm-eval ls tasks` prints them all; your own YAMLs are found through include_path."
            )
    return manager


def _result(name: str, results: dict[str, Any], protocol: dict[str, Any]) -> TaskResult:
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in results["results"][name].items()
        if isinstance(value, float | int) and "_stderr" not in key and "," in key
    }
    samples = results["samples"].get(name, [])
    items = tuple(item for sample in samples if (item := _item(sample)) is not None)
    shots = results.get("n-shot", {}).get(name)
    return TaskResult(
        name=name,
        items=items if len(items) == len(samples) else (),
        metrics=metrics,
        protocol={**protocol, "num_fewshot": shots},
    )


def _item(sample: dict[str, Any]) -> Item | None:
    """The item behind a sample, or None where it is no choice between options after one context."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        return None
    loglik = [float(answer[0]) for answer in answers]
    continuations = [arguments[1] for arguments in sample["arguments"]]
    # With mutual information asked for, the second half repeats the options without their context.
    paired = "acc_mutual_info" in sample["metrics"]
    count = len(loglik) // 2 if paired else len(loglik)
    gold = _gold(sample["target"], continuations[:count])
    if gold is None or len(set(continuations[:count])) < 2:
        return None
    if not all(map(math.isfinite, loglik)):
        raise FloatingPointError(f"the model's log-likelihoods are {loglik} (task item {sample['doc_id']})")
    return Item(
        id=str(sample["doc"].get("id", sample["doc_id"])),
        gold=gold,
        option_loglik=tuple(loglik[:count]),
        baseline_loglik=tuple(loglik[count:]) if paired else None,
    )


def _gold(target: object, options: Sequence[str]) -> int | None:
    """Tasks give the right option as its index, as text holding the index, or as the option's own text."""
    if isinstance(target, int) and not isinstance(target, bool):
        return target if 0 <= target < len(options) else None
    stripped = [option.strip() for option in options]
    if isinstance(target, str) and target.strip() in stripped:
        return stripped.index(target.strip())
    return int(target) if isinstance(target, str) and target.isdigit() and int(target) < len(options) else None


@contextlib.contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Keep `datasets` from looking up its servers before it reads a local file. Its environment variable would be read
    at import only, and would stay set.
    """
    import datasets.config

    settings = mock.patch.multiple(datasets.config, HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True)
    with settings if offline else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet(progress: Progress | None) -> Iterator[Progress | None]:
    """Keep lm-eval's bars and log lines off the terminal, but not `progress`, nor exceptions."""
    import datasets

    terminal = sys.stderr
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()

    def shown(done: int, total: int) -> None:
        with contextlib.redirect_stderr(terminal):
            progress(done, total)  # type: ignore[misc]

    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        with contextlib.redirect_stderr(io.StringIO()):
            yield None if progress is None else shown
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
