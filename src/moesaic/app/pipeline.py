"""One experiment from its checked config to its record."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moesaic.app.plan import Plan, Point
from moesaic.app.schema import MoesaicConfig
from moesaic.app.stages import DOCUMENTS_FILE, FACTS_FILE, ITEMS_FILE, QUALITY_FILE, SPEED_FILE, read_json
from moesaic.config.errors import ConfigError
from moesaic.config.identity import identity
from moesaic.config.strict import strict_object
from moesaic.data.objective import positions_of
from moesaic.evaluate.items import items_from_rows, summarise
from moesaic.ffn.sites import find_ffns
from moesaic.runs import record as rec
from moesaic.runs.engine import StageFailedError, StageState, Store
from moesaic.runs.environment import describe_environment
from moesaic.runs.stage import Stage
from moesaic.runs.status import utc_now
from moesaic.sparse.model import head_of

__all__ = ["check", "plan_experiment", "run_experiment"]

CONFIG_FAILURES = ("diverged", "out_of_memory")  # what a configuration causes; the machine's faults end the run


def check(config: MoesaicConfig) -> None:
    """Refuse, before any stage runs, what cannot work with this backbone and corpus. Raises ConfigError."""
    skeleton = config.backbone.skeleton()
    for width in {site.read().width for site in find_ffns(skeleton, config.backbone.ffn)}:
        try:
            config.method.check_width(width)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error
    _check_allocation(config)
    config.evaluate.check()
    _check_objective(config, skeleton)
    positions = positions_of(skeleton.config)
    if positions is not None:
        _check_lengths(config, positions)


def _check_allocation(config: MoesaicConfig) -> None:
    method = config.method
    if method.allocate is None:
        return
    if not method.budgets or any(method.share(budget) is None for budget in method.budgets):
        raise ConfigError(
            f"method.allocate: the budgets of {method.name} ({list(method.budgets)}) are no active shares, so there is "
            "nothing to spread over layers. Use a method whose budget is a number of blocks, or method.allocate=null."
        )
    if not method.calibration_tokens:
        raise ConfigError("method.allocate needs calibration inputs: set method.calibration_tokens above 0.")


def _check_objective(config: MoesaicConfig, skeleton: PreTrainedModel) -> None:
    """What is for causal models only, or for classifications only."""
    try:
        head = head_of(skeleton)
    except ValueError as error:
        raise ConfigError(f"backbone: {error}") from error
    if head == "causal_lm":
        return
    if head == "sequence_classification" and not hasattr(config.data, "labels"):
        raise ConfigError(
            f"data={config.data.name} has no labels, but backbone={config.backbone.name} is a classifier. "
            "Use data=line_order, labelled or acceptability."
        )
    if head == "seq2seq_lm" and config.adapt.context % 2:
        raise ConfigError(f"adapt.context={config.adapt.context} has no equal halves for encoder and decoder.")
    unfit = {
        "evaluate.tasks": bool(config.evaluate.tasks),
        "evaluate.cett": config.evaluate.cett is not None,
        "bench.phases": bool(config.bench.phases),
    }
    if any(unfit.values()):
        raise ConfigError(
            f"{', '.join(name for name, wanted in unfit.items() if wanted)}: backbone={config.backbone.name} is a "
            f"{type(skeleton).__name__}, and only causal language models answer lm-eval's questions and have a prefill "
            "and a decode to time. Add evaluate=loss bench=none."
        )


def _check_lengths(config: MoesaicConfig, positions: int) -> None:
    wanted = {"adapt.context": config.adapt.context, "evaluate.perplexity.context": config.evaluate.perplexity.context}
    for name, length in wanted.items():
        if length > positions:
            raise ConfigError(f"{name}={length} exceeds the {positions} positions of {config.backbone.name}. Lower it.")
    config.bench.check("bench", positions)


def plan_experiment(config: MoesaicConfig) -> list[StageState]:
    """Every stage the experiment needs and what is already there, without computing anything."""
    check(config)
    store = Store(config.paths.runs)
    states = {state.title: state for leaf in Plan(config).leaves() for state in store.explain(leaf)}
    return list(states.values())


def run_experiment(config: MoesaicConfig, plain: dict[str, Any]) -> Path:
    """Compute what is missing and write the record; returns its folder.

    A point whose configuration fails (divergence, memory) is noted in the record with its reason and the others go on;
    any other failure, and one of a stage that every point needs, is raised.
    """
    check(config)
    disable_progress_bar()  # stages tell how far they are; a bar for every file loaded is noise
    plan, store = Plan(config), Store(config.paths.runs)
    store.ensure(plan.reference)
    points = list(plan.points())
    failures: dict[int, StageFailedError] = {}
    untimed: dict[int, StageFailedError | None] = {}
    for index, point in enumerate(points):
        try:
            store.ensure(plan.evaluation(point))
        except StageFailedError as error:
            if error.reason not in CONFIG_FAILURES:
                raise
            failures[index] = error
            print(f"moesaic: {error}; going on with the other points", file=sys.stderr, flush=True)
            continue
        if plan.is_timed(point):
            untimed[index] = _time(plan, store, point)
    folder = store.root / "record" / f"{config.method.name}-{plan.identity}"
    _write(plan, store, folder, plain, points, failures, untimed)
    if len(failures) == len(points):
        raise next(iter(failures.values()))
    return folder


def _time(plan: Plan, store: Store, point: Point) -> StageFailedError | None:
    """Time `point`; a failure costs its times, not its quality."""
    try:
        store.ensure(plan.timing(point))
    except StageFailedError as error:
        print(f"moesaic: {error}; its quality is kept", file=sys.stderr, flush=True)
        return error
    return None


def _write(
    plan: Plan,
    store: Store,
    folder: Path,
    plain: dict[str, Any],
    points: list[Point],
    failures: dict[int, StageFailedError],
    untimed: dict[int, StageFailedError | None],
) -> None:
    dense_items = items_by_task(store.folder(plan.reference))
    written, documents, items = [], [], []
    for index, point in enumerate(points):
        if index in failures:
            written.append(_failed(plan, point, failures[index]))
            continue
        source = store.folder(plan.evaluation(point))
        written.append(_measured(plan, store, point, source, dense_items, untimed.get(index)))
        where = {"arm": point.arm, "budget": point.budget}
        documents.append(pd.read_parquet(source / DOCUMENTS_FILE).assign(**where))
        items.append(pd.read_parquet(source / ITEMS_FILE).assign(**where))
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in ((rec.DOCUMENTS_FILE, documents), (rec.ITEMS_FILE, items)):
        if frames:
            pd.concat(frames, ignore_index=True).to_parquet(folder / name)
    rec.write_record(folder, _record(plan, store, plain, written, failed=bool(failures)))


def _record(plan: Plan, store: Store, plain: dict[str, Any], points: list[rec.Point], *, failed: bool) -> rec.Record:
    config, method = plan.config, plan.method
    reference = read_json(store.folder(plan.reference) / QUALITY_FILE)
    skeleton = config.backbone.skeleton()
    width = max(site.read().width for site in find_ffns(skeleton, config.backbone.ffn))
    blocks = method.for_width(width).blocks
    uses = {use.identity: use for leaf in plan.leaves() for use in store.uses(leaf)}
    return rec.Record(
        identity=plan.identity,
        configuration=identity(replace(config, seed=0)),
        name=f"{method.name}-{plan.identity}",
        study=config.study,
        created_utc=utc_now(),
        state="failed" if failed else "done",
        seed=config.seed,
        backbone=rec.BackboneInfo(
            name=config.backbone.name,
            identity=plan.backbone.identity,
            family=skeleton.config.model_type,
            parameters_total=reference["cost"]["parameters_total"],
            revision=config.backbone.fingerprint(),
        ),
        data=rec.DataInfo(name=config.data.name, fingerprint=config.data.fingerprint()),
        method=rec.MethodInfo(
            name=method.name,
            variant=method.variant,
            provenance=method.provenance,
            regime="post_training",
            num_blocks=blocks,
            block_size=width // blocks if blocks else None,
            knob=method.knob or None,
        ),
        protocol=reference["protocol"],
        config=plain,
        environment=describe_environment(config.bench.device),
        stages=list(uses.values()),
        adaptation=_adaptation(plan, store),
        points=points,
    )


def _adaptation(plan: Plan, store: Store) -> rec.Adaptation:
    """Tokens and steps that one adapted model saw, preparation included; time and facts of all budgets' phases."""
    names = [name for name, _ in plan.method.active_phases()]
    facts: dict[str, dict[str, Any]] = {}
    prepared: list[dict[str, Any]] = []
    if plan.method.prepare is not None:
        facts["prepare"] = {"phase": "prepare", "budget": None, **_facts(store, plan.prepared)}
        prepared = [facts["prepare"]]
    last: list[dict[str, Any]] = []
    for budget in plan.method.budgets or (None,):
        last = [*prepared]
        for name, (phase, stage) in zip(names, plan.phase_models(budget), strict=True):
            own = budget if plan.method.tied_to_budget(phase) else None
            last.append(facts.setdefault(stage.identity, {"phase": name, "budget": own, **_facts(store, stage)}))
    return rec.Adaptation(
        tokens=sum(fact.get("tokens", 0) for fact in last),
        steps=sum(fact.get("steps", 0) for fact in last),
        wall_seconds=sum(fact.get("wall_seconds", 0.0) for fact in facts.values()),
        phases=list(facts.values()),
    )


def _facts(store: Store, stage: Stage) -> dict[str, Any]:
    path = store.folder(stage) / FACTS_FILE
    return read_json(path) if path.exists() else {}


def _failed(plan: Plan, point: Point, error: StageFailedError) -> rec.Point:
    failure = rec.Failure(reason=error.reason, message=error.message)
    return rec.Point(arm=point.arm, budget=point.budget, knob=plan.method.knob or None, failure=failure)


def _measured(
    plan: Plan,
    store: Store,
    point: Point,
    source: Path,
    dense_items: dict[str, Any],
    untimed: StageFailedError | None,
) -> rec.Point:
    result = read_json(source / QUALITY_FILE)
    cost = dict(result["cost"])
    active = cost.pop("active_ffn_frac")
    cost.pop("attention_context_tokens")
    own_items = items_by_task(source)
    tasks = {
        name: rec.TaskScore(**_task_fields({**summary, **summarise(own_items[name], dense_items[name])}))
        for name, summary in result.get("tasks", {}).items()
        if name in own_items
    }
    timed = plan.is_timed(point) and untimed is None
    speed = read_json(store.folder(plan.timing(point)) / SPEED_FILE)["speed"] if timed else []
    return rec.Point(
        arm=point.arm,
        budget=point.budget,
        knob=plan.method.knob or None,
        active_ffn_frac=active,
        quality=rec.Quality(**result["quality"], tasks=tasks),
        cost=rec.Cost(**cost),
        speed=[strict_object(rec.Speed, cell) for cell in speed],
        routing=rec.RoutingUse(**result["routing"]) if result.get("routing") else None,
        cett=result.get("cett", {}),
        failure=None if untimed is None else rec.Failure(reason=untimed.reason, message=untimed.message),
    )


def _task_fields(summary: dict[str, Any]) -> dict[str, Any]:
    return {field.name: summary[field.name] for field in fields(rec.TaskScore) if field.name in summary}


def items_by_task(folder: Path) -> dict[str, Any]:
    """The answered items of each task in an evaluation's folder."""
    frame = pd.read_parquet(folder / ITEMS_FILE)
    if frame.empty:
        return {}
    tables = {str(task): rows.to_dict("records") for task, rows in frame.groupby("task", sort=False)}
    return {task: items_from_rows(cast(list[dict[str, Any]], rows)) for task, rows in tables.items()}
