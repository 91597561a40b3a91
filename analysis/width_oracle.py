"""Which layers would have to be wide for which token, and what a perfect router could gain, on one adapted model.

Run `python analysis/width_oracle.py RECORD OUT` with the record folder of a method with nested experts (flextron,
dynamoe, matformer). Writes summary.json, tokens.parquet and width_oracle.png. Four levels in six layers are 4,096
forward passes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from moesaic.data.tokens import TokenSplit
from moesaic.evaluate.width_oracle import search_widths
from moesaic.report.canvas import save_png
from moesaic.report.width_figure import draw_width_oracle
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.record import Record, read_record
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.levels import LevelRule, level_blocks
from moesaic.sparse.model import load_model
from moesaic.training.progress import ProgressLine


def main() -> None:
    """Search, write, print what was found at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="folder of a record.json, inside the runs folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="folder of an adapted model (default: that of the last phase)")
    parser.add_argument("--levels", type=int, nargs="+", help="block counts of the widths (default: the model's own)")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows, evenly spread")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=4096, help="patterns above which a beam searches")
    args = parser.parse_args()
    record = read_record(args.record)
    model = load_model(args.model or stage_folder(args.record, record, "adapt", f"*-{last_phase(record)}"))
    tokens = TokenSplit.load(stage_folder(args.record, record, "tokens", "*-heldout"))
    windows_NC = tokens.blocks(args.context)
    chosen = torch.linspace(0, len(windows_NC) - 1, min(args.windows, len(windows_NC))).long().tolist()
    ids_NC = torch.stack([torch.as_tensor(windows_NC[i].astype("int64")) for i in chosen])
    select, num_blocks = (sparse_layers(model)[0].select, sparse_layers(model)[0].experts.num_blocks)
    if args.levels is None and not isinstance(select, LevelRule):
        raise SystemExit(f"{record.name} selects by {type(select).__name__}, which has no levels: give --levels.")
    levels_E = args.levels or level_blocks(select.levels, num_blocks)
    with ProgressLine("width oracle", None, unit="patterns") as line:
        found = search_widths(
            model,
            ids_NC,
            levels_E,
            budgets=record.config["method"].get("budgets") or [],
            limit=args.limit,
            batch_size=args.batch_size,
            progress=lambda done, _: line.update(done),
        )
    summary = found.summary()
    args.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out / "summary.json", {"record": record.name, "seed": record.seed, **summary})
    pd.DataFrame(found.rows()).to_parquet(args.out / "tokens.parquet")
    save_png(
        draw_width_oracle(summary, f"{record.method.name} on {record.backbone.name}"), args.out / "width_oracle.png"
    )
    for row in summary["budgets"]:
        print(
            f"{row['share']:6.1%}  random {row['random_nats']:.4f}  best pattern {row['best_pattern']['nats']:.4f}  "
            f"oracle {row['oracle_nats']:.4f}  ({row['patterns']} patterns)"
        )
    for point in summary["learned"]:
        place = "none" if point["place_frac"] is None else f"{point['place_frac']:.2f}"
        print(f"learned at {point['budget']:g}: {point['share']:.1%}, {point['nats']:.4f}; 0 random, 1 oracle: {place}")


def last_phase(record: Record) -> str:
    """The name of the recipe's last phase that trained the model."""
    if not record.adaptation.phases:
        raise SystemExit(f"{record.name} was not adapted: give --model.")
    return str(record.adaptation.phases[-1]["phase"])


def stage_folder(folder: Path, record: Record, stage: str, label: str) -> Path:
    """The last folder of `stage` that the record used and whose label fits the pattern."""
    root = folder.parent.parent / stage
    uses = [path for use in record.stages if use.stage == stage for path in root.glob(f"{label}-{use.identity}")]
    if not uses:
        raise SystemExit(f"{folder} names no {stage}/{label} that still lies under {root}. Run the experiment again.")
    return uses[-1]


if __name__ == "__main__":
    main()
