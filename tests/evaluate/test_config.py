"""The shipped evaluations: each composes into a checked config, and says what data it misses before anything runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object
from moesaic.evaluate.config import EvaluateConfig

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "evaluate").glob("*.yaml"))
MANDATORY = {"stories": "story_ending.file", "blimp": "blimp.folder", "harness": "harness.task"}


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        node = compose(overrides=[f"+evaluate={name}", *overrides])
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return plain["evaluate"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_are_whole(name: str) -> None:
    missing = [f"evaluate.tasks.{MANDATORY[name]}=/nowhere"] if name in MANDATORY else []
    config = strict_object(EvaluateConfig, composed(name, *missing), "evaluate")
    assert config.perplexity.context >= 256
    if name in MANDATORY and name != "harness":
        with pytest.raises(ConfigError, match=rf"evaluate\.tasks\.{MANDATORY[name]}=/nowhere does not exist"):
            config.check()
    else:
        config.check()


@pytest.mark.parametrize("name", sorted(MANDATORY))
def test_mandatory_values_are_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.tasks\.{re.escape(MANDATORY[name])} is required"):
        strict_object(EvaluateConfig, composed(name), "evaluate")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+evaluate.perplexity.strid=3"], r"evaluate\.perplexity\.strid; did you mean 'stride'"),
        (["+evaluate.perplexity.stride=999"], r"evaluate\.perplexity\.stride=999 is not allowed: 1\.\.context=256"),
        (["+evaluate.batch_size=0"], r"evaluate\.batch_size=0 must be at least 1"),
        (["evaluate.tasks.next_line._target_=moesaic.evaluate.tasks.next_line.NextLin"], "did you mean 'NextLine'"),
    ],
)
def test_wrong_settings(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strict_object(EvaluateConfig, composed("default", *overrides), "evaluate")
