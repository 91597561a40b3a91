"""The command line on a small application of its own: `python stub.py [arguments]`, configs in ./conf."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.app.main import Application, run
from moesaic.config.strict import ConfigError, strict_object
from moesaic.runs.engine import StageState, Store
from moesaic.runs.stage import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class PartConfig:
    size: int

    def __post_init__(self) -> None:
        if self.size > 8:
            raise ValueError(f"size={self.size} exceeds 8 (allowed: 1..8). Lower it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    outcome: Literal["done", "diverged", "bug", "wait", "late"]
    part: PartConfig | None = None
    strength: float = 1.0  # not in any YAML: the default of a dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PathsConfig:
    runs: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StubConfig:
    method: MethodConfig
    paths: PathsConfig
    seed: int = 0
    dry_run: bool = field(default=False, metadata={"identity": False})
    keep_going: bool = field(default=True, metadata={"identity": False})


def stage_of(config: StubConfig) -> Stage:
    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        if config.method.outcome == "diverged" and config.seed != 2:
            raise FloatingPointError(f"loss is nan at step {config.seed}")
        if config.method.outcome == "late":
            raise ConfigError("data.train=nowhere.jsonl does not exist")
        (folder / "started").touch()
        while config.method.outcome == "wait":
            time.sleep(0.05)

    return Stage(name="adapt", label="stub", config={"method": config.method, "seed": config.seed}, compute=compute)


def run_experiment(config: StubConfig, plain: dict[str, Any]) -> Path:
    if config.method.outcome == "bug":
        raise KeyError("a name that is not there")
    assert plain["seed"] == config.seed
    return Store(config.paths.runs).ensure(stage_of(config))


def plan_experiment(config: StubConfig) -> list[StageState]:
    return Store(config.paths.runs).explain(stage_of(config))


APPLICATION = Application(
    conf=Path(__file__).with_name("conf"),
    configure=lambda plain: strict_object(StubConfig, plain),
    run=run_experiment,
    plan=plan_experiment,
)

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], APPLICATION))
