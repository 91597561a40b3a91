"""Labels, routers and token difficulty of one DynaMoE record as a picture.

Run `python analysis/difficulty.py RECORD OUT.png` with the record folder of a method that reports levels (dynamoe).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moesaic.report.canvas import save_png
from moesaic.report.levels_figure import draw_levels
from moesaic.runs.record import read_record


def main() -> None:
    """Find the phase that reported levels, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="folder of a record.json")
    parser.add_argument("out", type=Path, help="where the PNG goes")
    args = parser.parse_args()
    record = read_record(args.record)
    facts = next((phase for phase in record.adaptation.phases if "levels_LE" in phase), None)
    if facts is None:
        raise SystemExit(f"{record.name}: no phase reported levels of nested experts. Use a record of method=dynamoe.")
    save_png(draw_levels(facts, f"{record.name} on {record.backbone.name}, seed {record.seed}"), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
