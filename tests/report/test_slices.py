from typing import Any

import pytest
from report.toy_scores import scores

from moesaic.report.scores import LOSS
from moesaic.report.slices import NoControlError, Run, same_terms, slice_at

NARROW, WIDE = scores([4.0, 8.0], [1, 2]), scores([2.0, 6.0], [1, 2])
PROTOCOL = {"perplexity": {"context": 256, "batch_size": 8}, "tasks": {"t": {"limit": 10}}}


def test_a_measured_width_is_taken_as_it_is() -> None:
    found = slice_at(0.25, [(0.25, NARROW), (0.5, WIDE)], lower_is_better=True)
    assert found.scores is NARROW
    assert not found.interpolated


def test_between_two_widths_every_document_is_interpolated() -> None:
    far = scores([100.0, 100.0], [1, 2])
    found = slice_at(0.3, [(0.1, far), (0.25, NARROW), (0.5, WIDE), (0.9, far)], lower_is_better=True)
    # 0.3 is a fifth of the way from 0.25 to 0.5
    assert list(found.scores.sum_U) == pytest.approx([4.0 - 0.2 * 2, 8.0 - 0.2 * 2])
    assert (found.from_frac, found.to_frac, found.interpolated) == (0.25, 0.5, True)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_outside_the_measured_widths_there_is_no_value(share: float) -> None:
    with pytest.raises(NoControlError, match=r"lies outside the slices' \(25 %, 50 %\)"):
        slice_at(share, [(0.5, WIDE), (0.25, NARROW)], lower_is_better=True)


@pytest.mark.parametrize("share", [0.25, 0.3])
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_of_equal_widths_the_best_slice_counts(share: float, lower_is_better: bool) -> None:
    better = scores([3.0, 5.0], [1, 2])
    found = slice_at(share, [(0.25, NARROW), (0.25, better), (0.5, better)], lower_is_better=lower_is_better)
    alone = slice_at(share, [(0.25, better if lower_is_better else NARROW), (0.5, better)], lower_is_better=True)
    assert list(found.scores.sum_U) == list(alone.scores.sum_U)


def _run(**other: Any) -> Run:
    settings: dict[str, Any] = {"identity": "a", "model": "llama", "seed": 0, "tokens": 1000, "protocol": PROTOCOL}
    return Run(**{**settings, **other})


def test_equal_terms_are_kept() -> None:
    batch = {**PROTOCOL, "perplexity": {"context": 256, "batch_size": 4}}
    fitting = [_run(identity="b"), _run(identity="c", protocol=batch), _run(identity="d", tokens=1005)]
    others = [_run(seed=1), _run(tokens=500), _run(model="gpt2")]
    assert same_terms(_run(), [*others, *fitting], "static_slice", LOSS) == fitting


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        ([], "no static_slice was run on llama"),
        ([_run(model="gpt2")], "no static_slice was run on llama"),
        (
            [_run(protocol={"perplexity": {"context": 512}})],
            r"static_slice was measured under another protocol \(context: 512, here 256\)",
        ),
        ([_run(seed=1), _run(seed=2)], "no static_slice was run with seed 0"),
        ([_run(tokens=500), _run(tokens=2000)], "static_slice was adapted on 500 or 2,000 tokens, this on 1,000"),
        ([_run(tokens=None)], "static_slice was adapted on unknown tokens, this on 1,000"),
    ],
)
def test_what_differs_is_named(controls: list[Run], reason: str) -> None:
    with pytest.raises(NoControlError, match=reason):
        same_terms(_run(), controls, "static_slice", LOSS)


def test_each_measure_has_its_own_protocol() -> None:
    other_limit = _run(protocol={**PROTOCOL, "tasks": {"t": {"limit": 20}}})
    assert same_terms(_run(), [other_limit], "static_slice", LOSS) == [other_limit]
    with pytest.raises(NoControlError, match="limit: 20, here 10"):
        same_terms(_run(), [other_limit], "static_slice", "t.acc")
