"""Short names for configurations, models and machines: as little as tells them apart in this set of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

__all__ = ["label_configurations", "label_settings", "machine_name"]

_MAX_DIFFERENCES = 3


def label_configurations(frame: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Map each configuration to its label: the method, its variant where several occur, and settings that differ.

    Budgets and the inference knob are not in the label: they are shown beside it, so a curve over budgets keeps one
    name. `configs` maps a record's identity to its resolved config.
    """
    labels: dict[str, str] = {}
    first = frame.drop_duplicates("configuration")
    for (_, method), group in first.groupby(["model", "method"], sort=False):
        several = group["variant"].nunique(dropna=False) > 1
        for variant, members in group.groupby("variant", sort=False, dropna=False):
            base = f"{method} {variant}" if several and isinstance(variant, str) else str(method)
            labels |= _label_variant(base, members, configs)
    return labels | _separated(labels, frame)


def _label_variant(base: str, members: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    flat = {
        str(row["configuration"]): _flatten(configs.get(str(row["identity"]), {}), knob=str(row["knob"] or ""))
        for row in members.to_dict("records")
    }
    differing = _differing(list(flat.values()))
    labels = {}
    for configuration, settings in flat.items():
        shown = [f"{_short(key)}={_value(settings.get(key))}" for key in differing]
        labels[configuration] = f"{base} ({', '.join(shown)})" if 0 < len(shown) <= _MAX_DIFFERENCES else base
    return labels


def _separated(labels: Mapping[str, str], frame: pd.DataFrame) -> dict[str, str]:
    """Labels with a piece of the hash, where one label would stand for two results at the same arm and budget."""
    keys = frame.drop_duplicates(["configuration", "arm", "budget"])
    keys = keys.assign(label=keys["configuration"].map(dict(labels)))
    clash = keys[keys.duplicated(["model", "label", "arm", "budget"], keep=False)]
    return {str(c): f"{labels[str(c)]} #{str(c)[:4]}" for c in clash["configuration"].unique()}


def _flatten(node: Any, *, knob: str, path: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {path: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if str(key) not in {"budget", "budgets", "name", "variant", "provenance", knob}:
            flat |= _flatten(value, knob=knob, path=f"{path}.{key}" if path else str(key))
    return flat


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values differ; where the kind of a component differs, its own fields are not listed as well."""
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    kinds = [key.removesuffix("_target_") for key in differing if key.endswith("._target_")]
    return [key for key in differing if key.endswith("._target_") or not any(key.startswith(kind) for kind in kinds)]


def _short(key: str) -> str:
    parts = [part for part in key.split(".") if part != "_target_"]
    return parts[-1] if parts else key


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value.rsplit(".", 1)[-1] if value.count(".") > 1 else value
    return "-" if value is None else str(value)


def label_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns `model` (where quality is comparable) and `setting` (where times are, too)."""
    backbone = frame["backbone_name"]
    by_name = frame.groupby("backbone_name")["backbone_identity"].transform("nunique")
    backbone = backbone.where(by_name <= 1, backbone + " " + frame["backbone_identity"].fillna("").str[:4])
    data = frame["data_name"].fillna("")
    by_data = frame.groupby("data_name", dropna=False)["data_fingerprint"].transform("nunique")
    data = data.where(by_data <= 1, data + " " + frame["data_fingerprint"].fillna("").str[:4])
    model = backbone + " on " + data if data.nunique() > 1 else backbone
    setting = model + ", " + frame["machine"] if frame["machine"].nunique() > 1 else model
    return frame.assign(model=model, setting=setting)


def machine_name(environment: Mapping[str, Any], config: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What times were taken on, in a few words: processor, threads, dtype. "unknown machine" where nothing says.

    Threads and dtype of the timing are the ones asked for in `config`; left open there, they are the process's own
    number of threads and the dtype that quality was measured in.
    """
    bench, perplexity = config.get("bench"), protocol.get("perplexity")
    asked = bench if isinstance(bench, Mapping) else {}
    measured = perplexity if isinstance(perplexity, Mapping) else {}
    device = environment.get("device_name") or environment.get("device") or environment.get("host")
    threads = asked.get("threads") or environment.get("threads")
    dtype = asked.get("dtype") or measured.get("dtype")
    parts = [device, threads and f"{threads} threads", dtype]
    return ", ".join(str(part) for part in parts if part) or "unknown machine"
