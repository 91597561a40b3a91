"""Work for fresh processes, in a module of its own: what runs there is found by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def answer(request: Any) -> dict[str, Any]:
    return {"request": request, "pid": os.getpid(), "leader": os.getsid(0) == os.getpid()}


def refuse(_: Any) -> dict[str, Any]:
    raise ValueError("k=9 exceeds 8")


def fail(_: Any) -> dict[str, Any]:
    raise KeyError("a bug")


def run_out_of_memory(_: Any) -> dict[str, Any]:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def be_killed(_: Any) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leave(_: Any) -> dict[str, Any]:
    sys.stdout.flush()
    os._exit(3)


def never_end(folder: str) -> dict[str, Any]:
    (Path(folder) / "pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)
