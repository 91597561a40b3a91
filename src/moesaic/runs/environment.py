"""Where a number was measured: versions, processor, threads, device, code revision."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

__all__ = ["code_revision", "describe_environment"]

PACKAGES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "lm-eval", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """Return the environment of this process as plain values; `device` is what the measurement ran on.

    torch is not imported for it: where it is not loaded yet, `threads` is None.
    """
    return {
        "moesaic_version": _version("moesaic"),
        "code_revision": code_revision(),
        "python_version": platform.python_version(),
        **{f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_model": cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": os.cpu_count(),
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "device_name": _device_name(device),
    }


@cache
def code_revision() -> str:
    """Return `git describe` of the repository that tracks this package, else the package's version."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository: only one that tracks this very file counts.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return f"v{_version('moesaic')}"
    return _git(here.parent, "describe", "--always", "--dirty", "--tags", "--abbrev=12") or f"v{_version('moesaic')}"


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if device.startswith("cuda") and "torch" in sys.modules:
        return str(sys.modules["torch"].cuda.get_device_name(device))
    return cpu_model()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
