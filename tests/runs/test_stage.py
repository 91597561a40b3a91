"""Stages: what makes two of them the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moesaic.runs.stage import Stage, in_order


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    steps: int
    log_every_steps: int = field(default=10, metadata={"identity": False})


def nothing(folder: Path, parents: tuple[Path, ...]) -> None:
    """Compute nothing."""


def stage(**changes: object) -> Stage:
    fields: dict[str, object] = {"name": "adapt", "label": "toy", "config": {"fit": Fit(steps=3)}, "compute": nothing}
    return Stage(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_identity_is_that_of_the_content() -> None:
    same = [
        stage(),
        stage(label="other words"),
        stage(compute=print),
        stage(config={"fit": Fit(steps=3, log_every_steps=1)}),
    ]
    other = [
        stage(name="convert"),
        stage(version=2),
        stage(config={"fit": Fit(steps=4)}),
        stage(parents=(stage(),)),
        stage(parents=(stage(version=2),)),
        stage(parents=(stage(), stage(version=2))),
        stage(parents=(stage(version=2), stage())),
    ]
    assert len({each.identity for each in same}) == 1
    assert len({each.identity for each in [stage(), *other]}) == len(other) + 1


def test_the_folder_is_named_for_people_and_safe() -> None:
    one = stage(label="../meta-llama/Llama 2")
    assert one.folder_name == f"meta-llama-Llama-2-{one.identity}"
    assert stage(label="...").folder_name == f"adapt-{stage().identity}"


def test_the_order_puts_parents_first_and_each_once() -> None:
    bottom = stage(name="a")
    left, right = stage(name="b", parents=(bottom,)), stage(name="c", parents=(bottom,))
    assert [each.name for each in in_order(stage(name="d", parents=(left, right)))] == ["a", "b", "c", "d"]
