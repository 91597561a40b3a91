"""A stage: one step of an experiment, named by the content of all that decides its output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.config.identity import identity
from moesaic.config.strict import to_plain

__all__ = ["Compute", "Stage", "in_order"]

Compute = Callable[[Path, tuple[Path, ...]], None]
"""Fills the folder it is given, from the folders of the parents; files already there are its own, of an earlier try."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step: what it is called, what decides its output, what it needs and how it is computed.

    `identity` covers `name`, `config` (without the fields that declare themselves outside), the parents' identities and
    `version`; raise `version` when the code of `compute` changes its output. `label` is only for people: it begins the
    folder's name and must follow from the config, so that one identity has one folder.
    """

    name: str  # kind of step and folder of its outputs: "adapt"
    label: str  # what a person looks for: "moefication"
    config: Any  # dataclass or plain tree
    compute: Compute = field(compare=False, repr=False)
    parents: tuple[Stage, ...] = ()
    version: int = 1
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        counted = {"stage": self.name, "config": self.config, "version": self.version}
        parents = [parent.identity for parent in self.parents]
        object.__setattr__(self, "identity", identity({**counted, "parents": parents}))

    @property
    def folder_name(self) -> str:
        """`<label>-<identity>`, safe as a file name."""
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.label).strip('.-') or self.name}-{self.identity}"

    @property
    def title(self) -> str:
        """How messages call it: `<name>/<label>-<identity>`, which is also its place under the root."""
        return f"{self.name}/{self.folder_name}"

    def frozen(self) -> dict[str, Any]:
        """Everything that decided the output, as plain values for the `config.json` in its folder."""
        return {
            "stage": self.name,
            "label": self.label,
            "identity": self.identity,
            "version": self.version,
            "parents": [parent.title for parent in self.parents],
            "config": to_plain(self.config),
        }


def in_order(*stages: Stage) -> list[Stage]:
    """Return `stages` and all that they need, each once, parents before children."""
    found: dict[str, Stage] = {}
    for stage in stages:
        _collect(stage, found)
    return list(found.values())


def _collect(stage: Stage, found: dict[str, Stage]) -> None:
    if stage.title not in found:
        for parent in stage.parents:
            _collect(parent, found)
        found[stage.title] = stage
