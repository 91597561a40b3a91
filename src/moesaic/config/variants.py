"""Variants: one method, several readings of its paper, as columns of one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.config.errors import ConfigError, did_you_mean

__all__ = ["apply_variant"]

MISSING = "???"
TARGET = "_target_"


def apply_variant(node: Mapping[str, Any], path: str = "method") -> dict[str, Any]:
    """`node` without its `variants`, the column that `node["variant"]` names filled in under it.

    A key that the node leaves open (absent, or `???`) takes the column's value; a key that has a value, because a
    command line or an experiment set it, keeps it. A component of another `_target_` than the column's is left as it
    is. What is still `???` afterwards is left out, so that the class's own default holds.
    Raises ConfigError for a variant that the method does not have.
    """
    rest = {key: value for key, value in node.items() if key != "variants"}
    columns = node.get("variants", {})
    name = rest.get("variant")
    if columns and name not in columns:
        hint = did_you_mean(str(name), columns) or "."
        allowed = ", ".join(columns)
        raise ConfigError(f"{path}.variant={name!r} is not a variant of {rest.get('name')}{hint} Allowed: {allowed}.")
    return _without_missing(_under(rest, columns.get(name, {})))


def _under(node: Mapping[str, Any], column: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(node)
    for key, value in column.items():
        if key not in merged or merged[key] == MISSING:
            merged[key] = value
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping) and _same_kind(merged[key], value):
            merged[key] = _under(merged[key], value)
    return merged


def _same_kind(node: Mapping[str, Any], column: Mapping[str, Any]) -> bool:
    return TARGET not in column or TARGET not in node or node[TARGET] == column[TARGET]


def _without_missing(node: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in node.items() if value != MISSING}
    return {key: _without_missing(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
