"""Time of one training step of every method's phases beside the dense fine-tuning step, interleaved in one process.

Run `python analysis/bench/training_step.py runs/training_step backbone=hf backbone.path=... data=...`: any overrides of
`moesaic`; without any, the ready SwiGLU backbone on the standard library. Forward, backward and optimizer are timed on
the same token batches; the ratio is of medians' pairs with a 95 % bootstrap interval. Phases that train no weights
are timed too, against the same dense step. The table is printed and written to <folder>/training_step.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning import LightningModule

from moesaic.app.compose import compose_plain
from moesaic.app.plan import Plan
from moesaic.app.schema import MoesaicConfig
from moesaic.app.stages import load_any
from moesaic.bench.samples import Times, interleave, paired_ratio
from moesaic.config.strict import strict_object
from moesaic.data.tokens import TokenSplit
from moesaic.methods.base import AdaptJob, SparseMethod, select_blocks
from moesaic.methods.calibration import Calibration
from moesaic.runs.engine import Store
from moesaic.runs.environment import describe_environment
from moesaic.training import lightning
from moesaic.training.fit import FitConfig, FitResult

METHODS = (
    "factorllm", "moefication", "lte", "dynamoe", "flextron", "expert_token_resonance", "d2dmoe", "llama_moe",
    "static_slice",
)  # fmt: skip
FITS = ("adapt.fit.steps=4", "adapt.fit.warmup_steps=0", "adapt.router_fit.steps=4", "adapt.router_fit.warmup_steps=0")
ROUNDS, WARM_UP = 9, 2

Step = Callable[[], object]


def main(folder: Path, overrides: list[str]) -> None:
    """Time each phase of each method and write the table."""
    found: list[Step] = []
    walk("dense_same_tokens", folder, overrides, lambda _, step: found.append(step))
    (dense,) = found
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        walk(
            method, folder, overrides, lambda phase, step, method=method: rows.append(timed(method, phase, step, dense))
        )
    described = {"environment": describe_environment("cpu"), "overrides": overrides, "rounds": ROUNDS, "rows": rows}
    (folder / "training_step.json").write_text(json.dumps(described, indent=1))


def timed(method: str, phase: str, own: Step, dense: Step) -> dict[str, Any]:
    """The row of one fit, printed too."""
    seconds = interleave({"dense": lambda: dense, "own": lambda: own}, rounds=ROUNDS, warm_up=WARM_UP)
    ratio = paired_ratio(seconds["own"], seconds["dense"])
    times = {f"{name}_ms": Times.of([1e3 * s for s in samples]).plain() for name, samples in seconds.items()}
    print(
        f"{method:24} {phase:12} dense {times['dense_ms']['median']:7.0f} ms  own {times['own_ms']['median']:7.0f} ms  "
        f"ratio {ratio.median:5.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        flush=True,
    )
    return {"method": method, "phase": phase, "ratio": ratio.median, "low": ratio.low, "high": ratio.high, **times}


def walk(method: str, folder: Path, overrides: list[str], on_fit: Callable[[str, Step], object]) -> None:
    """Run the recipe of a method at its first budget; `on_fit` gets each fit's phase and step, within the phase."""
    plain = compose_plain([*overrides, *FITS, f"method={method}", f"paths.runs={folder / 'runs'}", "bench=none"])
    config = strict_object(MoesaicConfig, plain)
    plan, store = Plan(config), Store(config.paths.runs)
    budget = next(iter(config.method.budgets), None)
    model, _ = load_any(store.ensure(plan.converted(budget)))
    model.float()
    cached = None if plan.calibration is None else Calibration.load(store.ensure(plan.calibration))
    tokens = TokenSplit.load(store.ensure(plan.tokens("train")))
    for name, phase in config.method.active_phases():
        if isinstance(config.method, SparseMethod):
            select_blocks(model, config.method.selection_at(budget))
        with tempfile.TemporaryDirectory() as scratch, intercepted(lambda step, name=name: on_fit(name, step)):
            job = AdaptJob(
                model=model, pattern=config.backbone.ffn, calibration=cached, tokens=tokens,
                context=config.adapt.context, seed=0, folder=Path(scratch), label=name,
            )  # fmt: skip
            phase.run(job)


@contextmanager
def intercepted(on_fit: Callable[[Step], object]) -> Iterator[None]:
    """Within the scope each fit first hands over its step; then it trains, so that the recipe can go on."""
    train = lightning.run

    def run(module: LightningModule, batches: Any, cfg: FitConfig, **where: Any) -> FitResult:
        on_fit(step_of(module, batches, cfg))
        return train(module, batches, cfg, **where)

    with patch.object(lightning, "run", run):
        yield


def step_of(module: LightningModule, batches: Any, cfg: FitConfig) -> Step:
    """Forward, backward and optimizer step on the next batch, as `fit` would do it."""
    optimizer = module.configure_optimizers()["optimizer"]
    stream = cycle(list(islice(iter(batches.with_steps(cfg.steps)), cfg.steps)))
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=cfg.precision == "bf16-mixed")

    def step() -> None:
        with mixed:
            loss = module.training_step(next(stream), 0)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
