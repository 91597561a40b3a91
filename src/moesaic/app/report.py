"""`moesaic-report RUNS_DIR`: table, fronts, gap ladder and page from the records that `moesaic` wrote."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 failed while working, 2 refused input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesaic-report", description="Build report.html, its pictures and its tables (table, pays) from records."
    )
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="folder that moesaic wrote its runs to")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUNS_DIR/report)")
    parser.add_argument(
        "--quality",
        default="perplexity",
        help="what fronts are drawn over: perplexity, bits_per_byte, nats_per_token, <task>.acc (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        nargs=2,
        type=float,
        metavar=("QUALITY", "TIME"),
        help="reference point of the hypervolume, both in units of the dense model (default: 2.0 1.25)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # pandas, matplotlib and scipy take seconds to import; --help and a wrong argument must not wait for them.
    from rich.console import Console

    from moesaic.report.front import ReferencePoint
    from moesaic.report.load import load
    from moesaic.report.results import analyse
    from moesaic.report.terminal import print_files, print_results
    from moesaic.report.write import write_report

    try:
        reference = ReferencePoint(*arguments.reference) if arguments.reference else ReferencePoint()
        results = analyse(load(arguments.runs), arguments.quality, reference)
    except ValueError as error:
        print(f"moesaic-report: {error}", file=sys.stderr)
        return REFUSED
    console = Console()
    print_results(console, results)
    out = arguments.out or arguments.runs / "report"
    try:
        print_files(console, write_report(results, out))
    except OSError as error:
        print(f"moesaic-report: cannot write to {out}: {error}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
