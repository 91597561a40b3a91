"""How an evaluation tells how far it is."""

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[int, int], None]  # (done, total), in windows or requests; the last call has done == total
