"""The latency table of an FFN's levels on this machine.

Run `python analysis/bench/level_latency.py OUT.json --dim 256 --width 1024` with the sizes of the model's FFNs, and
give the file to a run as `method.phases.joint.cost.latency_table=OUT.json`: budgets are then shares of time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moesaic.bench.level_latency import measure_levels
from moesaic.config.strict import to_plain
from moesaic.runs.atomic import write_json_atomic
from moesaic.sparse.levels import level_blocks


def main() -> None:
    """Measure, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dim", type=int, required=True, help="model dim D")
    parser.add_argument("--width", type=int, required=True, help="FFN width F")
    parser.add_argument("--blocks", type=int, default=8, help="blocks that the FFN is cut into")
    parser.add_argument("--levels", choices=("geometric", "linear"), default="geometric")
    parser.add_argument("--layers", type=int, default=6, help="FFNs with weights of their own in one pass")
    parser.add_argument("--tokens", type=int, default=256, help="tokens at once: a prompt, or a batch of decode steps")
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--plain", action="store_true", help="an FFN without gate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    table = measure_levels(
        dim=args.dim,
        width=args.width,
        num_blocks=args.blocks,
        blocks_X=level_blocks(args.levels, args.blocks),
        num_layers=args.layers,
        tokens=args.tokens,
        activation=args.activation,
        gated=not args.plain,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        rounds=args.rounds,
    )
    write_json_atomic(args.out, to_plain(table))
    for blocks, ms in zip(table.blocks_X, table.ms_X, strict=True):
        shares = f"{ms / table.ms_X[-1]:6.1%} of the time, {blocks / table.num_blocks:6.1%} of the width"
        print(f"{blocks:4} of {table.num_blocks} blocks  {ms:9.4f} ms  {shares}")


if __name__ == "__main__":
    main()
