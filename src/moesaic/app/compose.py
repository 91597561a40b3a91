"""From overrides to a plain tree: Hydra composes, the method's variant is filled in, interpolations are resolved.

Hydra's own rule, that a key absent from the YAML needs a `+`, is lifted: the YAMLs hold only what makes a choice, the
rest are defaults of dataclasses, and the strict walk afterwards knows better which keys there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from moesaic.app.groups import conf_folder
from moesaic.config.errors import ConfigError
from moesaic.config.variants import apply_variant

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["CONFIG_NAME", "HYDRA_VERSION_BASE", "compose_plain", "plain_tree", "with_default_keys"]

T = TypeVar("T")

CONFIG_NAME = "config"
HYDRA_VERSION_BASE = "1.3"
ABSENT_KEY = re.compile(r"Could not override '([\w.\-]+)'\.\s+To append to your config")


def compose_plain(overrides: Sequence[str] = (), *, conf: Path | None = None) -> dict[str, Any]:
    """Return the plain tree that `moesaic OVERRIDES` would check and run, composed without a command line.

    Raises: ConfigError for a variant that does not exist or an interpolation that leads nowhere; Hydra's own errors.
    """
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base=HYDRA_VERSION_BASE, config_dir=str(conf or conf_folder())):
        return plain_tree(with_default_keys(overrides, lambda given: compose(CONFIG_NAME, overrides=given)))


def with_default_keys(arguments: Sequence[str], compose: Callable[[list[str]], T]) -> T:
    """Return `compose(arguments)`, with `key=value` given as `++key=value` where no YAML holds that key.

    Only those are rewritten, after Hydra has refused them: a grid in an experiment's YAML can be overridden by the
    command line only where both spell the key alike.
    """
    from hydra.errors import ConfigCompositionException

    given = list(arguments)
    while True:
        try:
            return compose(given)
        except ConfigCompositionException as error:
            absent = ABSENT_KEY.match(str(error))
            places = [i for i, each in enumerate(given) if absent and each.startswith(f"{absent[1]}=")]
            if not places or given[places[0]].startswith("hydra."):
                raise
            given[places[0]] = f"++{given[places[0]]}"


def plain_tree(cfg: DictConfig) -> dict[str, Any]:
    """Return what Hydra composed as a plain tree: the method's variant filled in, then every interpolation resolved.

    Raises: ConfigError for a variant that does not exist or an interpolation that leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    if isinstance(node.get("method"), dict):
        node["method"] = apply_variant(node["method"])
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(node), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
