"""An executor that computes something else is refused before the clock starts."""

import pytest
import torch
from bench.toy import prompts_NC, sparse_toy
from torch import Tensor

from moesaic.bench.check import OutputMismatchError, check_outputs, relative_error
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import set_executor, sparse_layers
from moesaic.sparse.routing import Routing


@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_executors_pass_and_stay_set(executor: str, dtype: torch.dtype) -> None:
    model = sparse_toy().to(dtype)
    set_executor(model, executor)
    layers = sparse_layers(model)
    with torch.inference_mode():
        check_outputs(layers, lambda: model(prompts_NC(2, 9)))
    assert [layer.executor for layer in layers] == [executor] * 2
    assert not any(layer._forward_hooks for layer in layers)


def forgets_one_token(x_TD: Tensor, experts: Experts, routing: Routing) -> Tensor:
    y_TD = EXECUTORS["masked"](x_TD, experts, routing).clone()
    y_TD[-1] = 0
    return y_TD


def test_one_wrong_token_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXECUTORS, "loop", forgets_one_token)
    model = sparse_toy()
    layers = sparse_layers(model)
    layers[1].executor = "loop"
    with pytest.raises(OutputMismatchError, match=r"layer 1: executor loop differs from masked by .*not timed"):
        check_outputs(layers, lambda: model(prompts_NC(4, 24)))
    assert layers[1].executor == "loop"


def test_nan_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXECUTORS, "loop", lambda x_TD, *_: x_TD * float("nan"))
    model = sparse_toy(executor="loop")
    with pytest.raises(OutputMismatchError):
        check_outputs(sparse_layers(model), lambda: model(prompts_NC(1, 3)))


def test_relative_error_by_hand() -> None:
    reference_TD = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert relative_error(reference_TD, reference_TD) == 0
    assert relative_error(reference_TD + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference_TD) == pytest.approx(0.2)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
