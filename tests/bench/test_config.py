"""What may be asked for, and the shipped YAMLs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesaic.bench.config import BenchConfig, prompt_rows
from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object

CONF = sorted((Path(__file__).parents[2] / "conf/bench").glob("*.yaml"))


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_shipped_configs_are_whole(path: Path) -> None:
    config = strict_object(BenchConfig, yaml.safe_load(path.read_text()))
    assert bool(config.phases) == (path.stem != "none")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rounds": 0}, r"bench\.rounds=0 must be at least 1"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes\[1\]=0"),
        ({"batch_sizes": []}, r"batch_sizes=\[\] leaves nothing to time"),
        ({"executors": ["gruoped"]}, "did you mean 'grouped'"),
        ({"phases": ["prefil"]}, "did you mean 'prefill'"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strict_object(BenchConfig, wrong, "bench")


def test_lengths_must_fit_the_model() -> None:
    config = BenchConfig(prefill_tokens=100, decode_context=60, decode_steps=16)
    config.check("bench", 100)
    with pytest.raises(ConfigError, match=r"bench: timing needs 100 positions .*but the model has 99"):
        config.check("bench", 99)
    BenchConfig(prefill_tokens=10**6, phases=("decode",)).check("bench", 512)
    BenchConfig(phases=()).check("bench", 1)


def test_prompts_are_rows_of_real_tokens_spread_evenly() -> None:
    tokens_NC = np.arange(70, dtype=np.uint16).reshape(7, 10)
    config = BenchConfig(batch_sizes=(1, 3), phases=("prefill",), prefill_tokens=4)
    rows = prompt_rows(tokens_NC, config)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 1, 2, 3], [30, 31, 32, 33], [60, 61, 62, 63]]


@pytest.mark.parametrize("shape", [(2, 10), (7, 3)])
def test_too_few_tokens_are_refused(shape: tuple[int, int]) -> None:
    config = BenchConfig(batch_sizes=(3,), phases=("prefill",), prefill_tokens=4)
    with pytest.raises(ValueError, match=f"3 rows of 4 held-out tokens, but there are {shape[0]} of {shape[1]}"):
        prompt_rows(np.zeros(shape, dtype=np.uint16), config)
