"""Every YAML in conf/ composes into a checked config; every job of every ready grid does, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moesaic.app.compose import compose_plain
from moesaic.app.groups import conf_folder
from moesaic.app.schema import MoesaicConfig
from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object

CONF = conf_folder()
# What a YAML leaves to the user, by group and option.
GIVEN = {
    ("backbone", "hf"): ["backbone.path=org/model"],
    ("backbone", "llama2c"): ["backbone.checkpoint=model.bin", "backbone.tokenizer=tok.bin"],
    ("backbone", "roberta_classifier"): ["data=line_order"],
    ("data", "acceptability"): ["data.folder=blimp"],
    ("data", "labelled"): ["data.train=a.jsonl", "data.heldout=b.jsonl"],
    ("data", "novels"): ["data.train=a.jsonl", "data.heldout=b.jsonl"],
    ("data", "text"): ["data.train=a.txt", "data.heldout=b.txt"],
    ("evaluate", "blimp"): ["evaluate.tasks.blimp.folder=blimp"],
    ("evaluate", "stories"): ["evaluate.tasks.story_ending.file=stories.txt"],
    ("evaluate", "harness"): ["evaluate.tasks.harness.task=piqa"],
}
SINGLE = ("adapt", "backbone", "bench", "data", "debug", "evaluate", "method", "paths")
GRIDS = ("experiment", "paper")


def options(groups: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(group, path.stem) for group in groups for path in sorted((CONF / group).glob("*.yaml"))]


def configured(overrides: list[str]) -> MoesaicConfig:
    return strict_object(MoesaicConfig, compose_plain(overrides))


@pytest.mark.parametrize(("group", "option"), options(SINGLE))
def test_every_option_composes_into_a_checked_config(group, option):
    config = configured([f"{group}={option}", *GIVEN.get((group, option), [])])
    assert isinstance(config, MoesaicConfig)


@pytest.mark.parametrize(("group", "option"), options(GRIDS))
def test_every_job_of_every_grid_composes(group, option):
    jobs = list(grid(CONF / group / f"{option}.yaml"))
    names = {str(configured([f"{group}={option}", *job]).method) for job in jobs}
    assert len(names) > 1 or len(jobs) == 1 or "adapt" in str(jobs) or "seed" in str(jobs)


def grid(path: Path) -> Iterator[list[str]]:
    """The overrides of each job that the experiment's own sweep would start; one empty job where it has none."""
    params = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        yield from (list(job) for job in batch)


@pytest.mark.parametrize("partition", sorted(path.stem for path in (CONF / "method/partition").glob("*.yaml")))
@pytest.mark.parametrize("method", ["moefication", "factorllm"])
def test_partitions_are_exchanged_without_leftovers(method, partition):
    chosen = configured([f"method={method}", f"method/partition={partition}"]).method
    assert type(chosen.partition).__name__.lower().removeprefix("balanced") == partition.replace("_", "")


@pytest.mark.parametrize("score", sorted(path.stem for path in (CONF / "method/score").glob("*.yaml")))
def test_scores_are_exchanged_without_leftovers(score):
    chosen = configured(["method=moefication", f"method/score={score}"]).method
    assert type(chosen.score).__name__.lower().removesuffix("score") == score.replace("_", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.select.kk=3"], r"method\.select\.kk.*did you mean 'k'"),
        (["+method.score.activatoin=softmax"], r"method\.score\.activatoin.*did you mean 'activation'"),
        (["method.select.k=99"], r"k=99 exceeds partition\.num_blocks=32"),
        (["method.budgets=[8,99]"], r"k=99 exceeds partition\.num_blocks=32"),
        (["method.variant=as_publishd"], r"did you mean 'as_published'"),
        (["adapt.fit.lr=-1"], r"fit\.lr=-1"),
        (["seed=one"], r"seed='one'"),
    ],
)
def test_wrong_values_are_refused_with_the_way_out(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(overrides)
