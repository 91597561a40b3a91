"""What is timed, and how long that may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesaic.bench.cost import Phase
from moesaic.config.errors import ConfigError
from moesaic.sparse.executors import check_executor

__all__ = ["BenchConfig", "Control", "Dtype", "prompt_rows"]

Control = Literal["all_blocks", "balanced"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Phases and shapes to time; no `phases` means that nothing is timed.

    A prefill is one call of `prefill_tokens` tokens per sequence. A decode sample is `decode_steps` one-token steps
    after `decode_context` tokens, and what is reported is one step. Each (phase, batch size) takes `rounds` samples of
    each arm in turns, fewer once its share of `max_seconds` is used up. `controls` are further arms: `all_blocks` (the
    overhead of sparse execution) and `balanced` (as many blocks, spread evenly). `executors` are timed too, each as an
    arm, beside what the model is set to. `threads` and `dtype` None mean torch's default and the saved weights'
    dtype. After `timeout_seconds` the process is killed.
    """

    phases: tuple[Phase, ...] = ("prefill", "decode")
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    prefill_tokens: int = 512
    decode_context: int = 256
    decode_steps: int = 16
    rounds: int = 30
    warm_up_rounds: int = 2
    controls: tuple[Control, ...] = ("all_blocks", "balanced")
    executors: tuple[str, ...] = ()
    max_seconds: float = 60.0
    timeout_seconds: float = 600.0
    threads: int | None = None
    dtype: Dtype | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("prefill_tokens", "decode_context", "decode_steps", "rounds")}
        counts |= {f"batch_sizes[{at}]": size for at, size in enumerate(self.batch_sizes)}
        counts |= {} if self.threads is None else {"threads": self.threads}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in self.executors:
            check_executor(name)
        if self.phases and not self.batch_sizes:
            raise ValueError("batch_sizes=[] leaves nothing to time; phases: [] is how to say that.")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt row that the phases need."""
        decode = self.decode_context + self.decode_steps if "decode" in self.phases else 0
        return max(self.prefill_tokens if "prefill" in self.phases else 0, decode)

    def check(self, path: str, context: int) -> None:
        """Refuse lengths that a model with `context` positions cannot take; `path` is where this config sits.

        Raises: ConfigError.
        """
        if self.prompt_tokens > context:
            raise ConfigError(
                f"{path}: timing needs {self.prompt_tokens} positions (prefill_tokens={self.prefill_tokens}, "
                f"decode_context + decode_steps={self.decode_context + self.decode_steps}), but the model has "
                f"{context}. Lower them."
            )


def prompt_rows(tokens_NC: np.ndarray, config: BenchConfig) -> np.ndarray:
    """As many rows of real tokens as the largest batch needs, int64, spread evenly over `tokens_NC` (N rows, C each).

    Raises: ValueError where there are too few.
    """
    rows, columns = max(config.batch_sizes), config.prompt_tokens
    if tokens_NC.shape[0] < rows or tokens_NC.shape[1] < columns:
        raise ValueError(
            f"timing needs {rows} rows of {columns} held-out tokens, but there are {tokens_NC.shape[0]} of "
            f"{tokens_NC.shape[1]}. Lower bench.batch_sizes, prefill_tokens or decode_context, or use more text."
        )
    picked = np.linspace(0, tokens_NC.shape[0] - 1, rows).round().astype(int)
    return np.asarray(tokens_NC[picked, :columns], dtype=np.int64)
