import io

from moesaic.training.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_terminal_line_is_rewritten_and_cleared() -> None:
    stream, clock = Terminal(), Clock()
    with ProgressLine("toy", 40, unit="steps", stream=stream, clock=clock) as line:
        line.update(10)
        clock.now += 10
        line.update(20, "loss 1.5")
        clock.now += 0.1
        line.update(21, "not yet shown again")
    # 10 steps took 10 s, 20 are left; the first 10 came from a checkpoint and say nothing about speed.
    assert stream.getvalue() == "\rtoy  20/40 steps (50%)  loss 1.5  ETA 0:20\x1b[K\r\x1b[K"


def test_elsewhere_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressLine("toy", None, unit="documents", stream=stream, clock=clock) as line:
        for done in range(100):
            clock.now += 1
            line.update(done)
    assert stream.getvalue().splitlines() == ["toy  29 documents", "toy  59 documents", "toy  89 documents"]
