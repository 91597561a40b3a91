"""One readable message for what Hydra, OmegaConf or YAML refuse."""

from __future__ import annotations

from collections.abc import Iterable

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moesaic.config.errors import ConfigError, did_you_mean

__all__ = ["REFUSALS", "refusal"]

REFUSALS = (ConfigError, HydraException, OmegaConfBaseException, YAMLError)
"""Errors that mean a wrong config, not a wrong program."""

NOISE = ("To append to your config", "full_key:", "reference_type=", "object_type=", "See https://")


def refusal(error: BaseException, groups: Iterable[str]) -> str:
    """Return what to tell the user about `error`, one of `REFUSALS`, with the nearest names where Hydra gives none.

    `groups` are the config groups there are.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        hint = did_you_mean(option, error.options) or "."
        return f"{group}={option} is no option of {group}{hint} Options: {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {_one_line(error.message)}"
    if isinstance(error, HydraException):
        return _one_line(f"{error}\n{error.__cause__ or ''}") + _nearest(error.__cause__, groups)
    return _one_line(str(error)) if isinstance(error, OmegaConfBaseException) else str(error)


def _nearest(cause: BaseException | None, groups: Iterable[str]) -> str:
    """Suggest a name for the key that OmegaConf did not find."""
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(cause.parent_node, DictConfig):
        return ""
    siblings = [str(key) for key in cause.parent_node]
    return did_you_mean(str(cause.key), groups if "/" in str(cause.key) else siblings)


def _one_line(text: str) -> str:
    """Hydra's messages are short sentences on lines of their own; some recommend what is no way out here."""
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(NOISE))
