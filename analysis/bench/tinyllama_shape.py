"""How close to the physical limit a sparse TinyLlama-1.1B is, with random weights: `make bench-tinyllama`.

Converts the shape (peak memory measured in a process of its own), then times prefill and decode of E = 4 blocks with
k = 1 and k = 2 active beside the dense model, in turns. Prints measured and ideal ratio, writes JSON beside this file.
Weights and prompts are random: they decide nothing about time but the routing, which is the random routers' own.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic.bench.config import BenchConfig
from moesaic.bench.timing import time_models
from moesaic.bench.worker import run_fresh
from moesaic.ffn.sites import find_ffns
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.environment import describe_environment
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN
from moesaic.sparse.model import convert_model
from moesaic.sparse.score import Linear
from moesaic.sparse.select import TopK

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
NUM_BLOCKS = 4
ACTIVE_BLOCKS = (1, 2)
GIB = 2**30
MEMORY_LIMIT_BYTES = 8 * GIB
OUTPUT = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One point: how many of the blocks run, and what is timed."""

    k: int
    config: BenchConfig


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    config = BenchConfig(
        batch_sizes=(1,),
        prefill_tokens=512,
        decode_context=512,
        decode_steps=16,
        rounds=arguments.rounds,
        controls=("all_blocks", "balanced"),
        max_seconds=arguments.max_seconds,
        threads=arguments.threads,
    )
    conversion = _answer(run_fresh(measure_conversion, Request(k=1, config=config), timeout_seconds=1800))
    print(
        f"conversion: {conversion['seconds']:.1f} s, peak memory {conversion['peak_rss_bytes'] / GIB:.2f} GiB "
        f"(limit {MEMORY_LIMIT_BYTES / GIB:.0f})",
        flush=True,
    )
    points = []
    for k in ACTIVE_BLOCKS:
        point = _answer(run_fresh(time_point, Request(k=k, config=config), timeout_seconds=3600))
        points.append({"num_blocks": NUM_BLOCKS, "k": k, **point})
        _print_point(points[-1])
    environment = {name: value for name, value in describe_environment().items() if name != "host"}
    result = {"shape": SHAPE, "environment": environment, "conversion": conversion, "points": points}
    write_json_atomic(arguments.output, result)
    print(f"written: {arguments.output}")
    if conversion["peak_rss_bytes"] > MEMORY_LIMIT_BYTES:
        raise SystemExit("the conversion needed more memory than it may")


def measure_conversion(request: Request) -> dict[str, Any]:
    """Seconds and peak resident memory of making the sparse model out of the dense one, the dense one included."""
    _set_threads(request)
    dense = dense_model()
    start = time.perf_counter()
    sparse_model(dense, request.k)
    return {
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def time_point(request: Request) -> dict[str, Any]:
    """Speed rows, ceilings, threads and raw samples of one k."""
    _set_threads(request)
    dense, own = dense_model(), sparse_model(dense_model(), request.k)
    generator = torch.Generator().manual_seed(0)
    prompts_NC = torch.randint(SHAPE["vocab_size"], (1, request.config.prompt_tokens), generator=generator)
    timing = time_models(dense, own, prompts_NC, request.config)
    return {**timing.plain(), "threads": torch.get_num_threads(), "samples": timing.samples}


def dense_model() -> PreTrainedModel:
    """The shape in bfloat16 with normal random weights; no float32 copy ever exists."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    # Its frequencies are a buffer that is computed, not stored.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    return model.eval()


def sparse_model(dense: PreTrainedModel, k: int) -> PreTrainedModel:
    """`dense`, used up: its neurons in their own order in `NUM_BLOCKS` blocks, random linear routers, top k."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for site in find_ffns(dense):
        ffn = site.read()
        experts = Experts.from_dense(ffn, torch.arange(ffn.width) // (ffn.width // NUM_BLOCKS))
        score = Linear().build(ffn.dim, NUM_BLOCKS).to(ffn.up_FD.dtype)
        score.initialise(experts, None, generator=generator)
        layers.append(SparseFFN(experts, score, TopK(k=k), Combine().build(ffn.dim, NUM_BLOCKS)))
        site.release()
    return convert_model(dense, layers).eval()


def _print_point(point: dict[str, Any]) -> None:
    for row in point["speed"]:
        share = row["captured_share"]
        print(
            f"E={point['num_blocks']} k={point['k']} {row['phase']:<7} {row['control']:<10} {row['executor']:<8} "
            f"dense {row['dense_ms']['median']:8.1f} ms ({row['dense_gb_per_s']:.1f} GB/s, "
            f"{row['dense_tflop_per_s']:.2f} TFLOP/s)  sparse {row['sparse_ms']['median']:8.1f} ms  "
            f"ratio {row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]  "
            f"ideal {row['ideal_ratio']:.3f}  captured {'-' if share is None else f'{share:.2f}'}"
            + ("  BEATS THE IDEAL: explain" if row["beats_ideal"] else ""),
            flush=True,
        )
    ceilings = point["ceilings"]
    print(
        f"  ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, {ceilings['threads']} threads, {ceilings['dtype']}",
        flush=True,
    )


def _answer(outcome: Any) -> dict[str, Any]:
    if outcome.failure is not None:
        raise SystemExit(f"{outcome.failure.reason}: {outcome.failure.message}")
    return dict(outcome.result)


def _set_threads(request: Request) -> None:
    if request.config.threads is not None:
        torch.set_num_threads(request.config.threads)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="samples of each arm")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--max-seconds", type=float, default=240.0, help="sampling time per k")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
