"""A process of its own for the tests of the store: `python worker.py ROOT count|fail` ensures one stage there.

Each try at computing adds a line to ROOT/tries.txt; the stage counts its steps in a file that survives a kill, and
halfway it waits until ROOT/go exists.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from moesaic.runs.engine import StageFailedError, Store
from moesaic.runs.stage import Stage

STEPS = 20
HALF = STEPS // 2


def counting_stage(root: Path, mode: str) -> Stage:
    def compute(folder: Path, parents: tuple[Path, ...]) -> None:
        with (root / "tries.txt").open("a") as tries:
            tries.write("try\n")
        done = folder / "steps.txt"
        for step in range(len(done.read_text().splitlines()) if done.exists() else 0, STEPS):
            while step == HALF and not (root / "go").exists():
                time.sleep(0.02)
            if step == HALF and mode == "fail":
                raise FloatingPointError(f"loss is nan at step {step}")
            with done.open("a") as file:
                file.write(f"{step}\n")

    return Stage(name="count", label="slow", config={"steps": STEPS}, compute=compute)


def main() -> int:
    root, mode = Path(sys.argv[1]), sys.argv[2]
    store = Store(root, heartbeat_s=0.1, poll_s=0.05)
    try:
        print(store.ensure(counting_stage(root, mode)))
    except StageFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
