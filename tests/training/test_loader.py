import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.training.loader import RowBatches, TokenBatches, order_of_pass


def numbered(rows: int, batch_size: int, steps: int | None = None, seed: int = 0) -> RowBatches:
    return RowBatches({"row": torch.arange(rows)}, batch_size=batch_size, seed=seed, steps=steps)


def drawn(batches: RowBatches) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def test_every_pass_visits_every_row_once_in_its_own_order() -> None:
    stream = list(itertools.chain(*drawn(numbered(10, 4, steps=5))))
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first == order_of_pass(10, seed=0, number=0).tolist()
    assert first != second
    assert stream != list(itertools.chain(*drawn(numbered(10, 4, steps=5, seed=1))))


def test_batch_larger_than_the_data_holds_several_passes() -> None:
    (batch,) = drawn(numbered(3, 7, steps=1))
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("position", range(6))
def test_state_restores_the_position(position: int) -> None:
    expected = drawn(numbered(10, 4, steps=6))
    batches = numbered(10, 4, steps=6)
    assert drawn_some(batches, position) == expected[:position]
    other = numbered(10, 4, steps=6)
    other.load_state_dict(batches.state_dict())
    assert drawn(other) == expected[position:]


def drawn_some(batches: RowBatches, count: int) -> list[list[int]]:
    return [batch["row"].tolist() for batch in itertools.islice(batches, count)]


def test_next_round_continues_the_stream() -> None:
    batches = numbered(10, 4)
    assert len(batches) == 2
    assert drawn(batches) + drawn(batches) == drawn(numbered(10, 4, steps=4))
    assert drawn(batches.with_steps(2)) == drawn(numbered(10, 4))


def test_a_second_fit_goes_on_where_the_first_one_stopped() -> None:
    whole = drawn(numbered(10, 4, steps=6))
    rest = numbered(10, 4).after(2).with_steps(4)
    assert drawn_some(rest, 1) == whole[2:3]
    resumed = numbered(10, 4).after(2).with_steps(4)
    resumed.load_state_dict(rest.state_dict())
    assert drawn(resumed) == whole[3:]


def test_tokens_come_as_int64_from_a_memory_map(tmp_path: Path) -> None:
    tokens_N = np.arange(60, dtype=np.uint16) + 60_000
    tokens_N.tofile(tmp_path / "tokens.bin")
    blocks_NC = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r").reshape(15, 4)
    batches = TokenBatches(blocks_NC, batch_size=5, seed=3)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.dtype == torch.int64
    assert ids.sort(0).values.tolist() == blocks_NC.astype(int).tolist()
    assert batches.tokens_per_batch == 20


def test_columns_stay_together_and_keep_their_dtype() -> None:
    x_ND = torch.arange(12.0, dtype=torch.bfloat16).reshape(6, 2)
    batch = RowBatches({"x": x_ND, "y": np.arange(6, dtype=np.float32)}, batch_size=4, seed=0).batch(0)
    assert batch["x"].dtype == torch.bfloat16
    assert batch["y"].dtype == torch.float32
    assert (batch["x"][:, 0] == 2 * batch["y"]).all()


def test_processes_share_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(numbered(10, 4, steps=3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(drawn(numbered(10, 4, steps=3)))
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
    with pytest.raises(ValueError, match="batch_size=3 is not divisible by the 2 processes"):
        numbered(10, 3).batch(0)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="one common number of rows"):
        RowBatches({"x": torch.zeros(3), "y": torch.zeros(4)}, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="one common number of rows"):
        RowBatches({}, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        numbered(3, 0)
    with pytest.raises(ValueError, match=r"shape \(rows, context\); given \(7,\)"):
        TokenBatches(torch.zeros(7), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="steps=0"):
        numbered(3, 1).with_steps(0)
