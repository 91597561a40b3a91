"""CETT: the worked example of its specification, its limits, and sparsity that rises with the price."""

import pytest
import torch
from methods.toy import toy_tokens
from toys import tiny_model

from moesaic.evaluate.cett import CettConfig, as_one_block, cett_curve, cett_sparsity
from moesaic.ffn.dense import DenseFFN
from moesaic.sparse.combine import Combine
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, sparse_layers
from moesaic.sparse.select import AllBlocks, Prefix

IDS = torch.arange(24).view(2, 12)


def example_layer() -> SparseFFN:
    """h = x for positive x, with down rows (3, 4), (1, 0), (0, 1); the token (1, .5, -.2) needs no ReLU: identity."""
    down_FD = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    ffn = DenseFFN(
        gate_FD=None,
        up_FD=torch.eye(3),
        down_FD=down_FD,
        gate_bias_F=None,
        up_bias_F=None,
        down_bias_D=None,
        activation="linear",
    )
    experts = Experts.from_dense(ffn, torch.zeros(3, dtype=torch.int64))
    return SparseFFN(experts, None, AllBlocks(), Combine().build(3, 1))


def test_the_worked_example():
    layer, x_TD = example_layer(), torch.tensor([[1.0, 0.5, -0.2]])
    torch.testing.assert_close(layer(x_TD), torch.tensor([[3.5, 3.8, 0.0]]))
    threshold = cett_curve(layer, x_TD)
    # n = (5, .5, .2): CETT is 0 up to .2, .0387 up to .5, .1042 up to 5, then 1.
    for bound, low, high in ((0.0, 0.0, 0.2), (0.0388, 0.2, 0.5), (0.1043, 0.5, 5.0), (1.0, 5.0, 6.0)):
        assert low <= threshold(bound) <= high + 1e-5
    assert threshold(0.0386) <= 0.2 + 1e-6
    assert threshold(0.1041) <= 0.5 + 1e-6


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_one_block_is_the_dense_model(family):
    dense = tiny_model(family)(IDS).logits
    torch.testing.assert_close(as_one_block(tiny_model(family))(IDS).logits, dense)


def test_sparsity_rises_with_the_price():
    model = as_one_block(tiny_model("llama"))
    config = CettConfig(increases_pct=(0.01, 0.1, 1.0), fit_tokens=256, report_tokens=512)
    before = model(IDS).logits
    found = cett_sparsity(model, toy_tokens(), config, context=16)
    sparsity = [found[key]["sparsity"] for key in ("0.01", "0.1", "1")]
    assert 0 <= sparsity[0] <= sparsity[1] <= sparsity[2] <= 1
    assert sparsity[0] < sparsity[2]
    assert torch.equal(model(IDS).logits, before)  # nothing is left behind


def test_zeros_of_relu_cost_nothing_and_idle_blocks_are_left_out_already():
    tokens = toy_tokens()
    config = CettConfig(increases_pct=(0.001,), fit_tokens=256, report_tokens=256)
    relu = as_one_block(tiny_model("opt"))
    zeros = []
    for layer in sparse_layers(relu):
        layer.register_forward_pre_hook(
            lambda layer, args: zeros.append((layer.experts.hidden(args[0], layer.experts.rows()) == 0).float().mean())
        )
    found = cett_sparsity(relu, tokens, config, context=16)["0.001"]["sparsity"]
    assert found >= torch.stack(zeros).mean() - 0.02
    half = as_one_block(tiny_model("llama"))
    for layer in sparse_layers(half):
        layer.experts = Experts.from_dense(layer.experts.dense_ffn(), torch.arange(layer.experts.block_size) % 2)
        layer.combine, layer.select = Combine().build(layer.experts.dim, 2), Prefix(k=1)
    assert cett_sparsity(half, tokens, config, context=16)["0.001"]["sparsity"] >= 0.5


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="percentages above 0"):
        CettConfig(increases_pct=(0.0,))
    with pytest.raises(ValueError, match="leaves nothing to report on"):
        cett_sparsity(as_one_block(tiny_model("llama")), toy_tokens(), CettConfig(fit_tokens=10**6), context=16)
