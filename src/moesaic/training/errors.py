"""What can go wrong while training, by name, so that callers need not catch everything."""

__all__ = ["CheckpointError", "DivergedError"]


class DivergedError(ArithmeticError):
    """The training loss became NaN or infinite at optimizer step `step` (counted from 1).

    `last_finite_loss` is the loss before it, None if the very first one was not finite.
    """

    def __init__(self, label: str, step: int, loss: float, last_finite_loss: float | None) -> None:
        before = "there was no finite loss before it" if last_finite_loss is None else f"before: {last_finite_loss:.4g}"
        super().__init__(
            f"{label}: loss is {loss} at step {step} ({before}). Lower lr, lengthen warmup_steps or set clip_norm."
        )
        self.step = step
        self.last_finite_loss = last_finite_loss


class CheckpointError(OSError):
    """A checkpoint could not be written; the file before it is untouched. `errno` and `filename` are the system's."""
