"""Every family's own FFN is the oracle: what `read()` computes must be what the model computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import CAUSAL_FAMILIES, TOY_FAMILIES, TOY_WIDTH, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mamba import MambaConfig

from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import (
    UnknownFFNError,
    capture_inputs,
    capture_outputs,
    capture_preactivations,
    find_ffns,
)

GATED = {"llama", "mistral", "qwen2", "gemma", "gemma2", "phi3", "t5_gated"}
NAMES = {"gpt2": "transformer.h.1.mlp", "opt": "model.decoder.layers.1", "bert": "bert.encoder.layer.1"}


class Computes(nn.Module):
    """A replacement that computes the dense FFN from copies of its weights."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        copies = {name: getattr(ffn, name) for name in DenseFFN.__dataclass_fields__}
        self.ffn = DenseFFN(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in copies.items()})

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.ffn(x_TD)


def inputs(family: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if family.startswith("t5") else {"input_ids": ids}


def output_module(family: str, model: PreTrainedModel, name: str) -> nn.Module:
    """The module whose output is the FFN's, bias included, in a model as transformers built it."""
    inside = {"opt": "fc2", "bert": "output.dense", "roberta": "output.dense"}
    part = inside.get(family.removesuffix("_classifier"))
    return model.get_submodule(f"{name}.{part}" if part else name)


def own_ffn_traffic(family: str, model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Input and output of each FFN during one forward."""
    sites = find_ffns(model)
    seen_in: dict[int, Tensor] = {}
    seen_out: dict[int, Tensor] = {}
    handles = [
        output_module(family, model, site.name).register_forward_hook(
            lambda _m, _a, y, i=site.index: seen_out.update({i: y})
        )
        for site in sites
    ]
    with capture_inputs(sites, lambda index, x: seen_in.update({index: x})), torch.no_grad():
        model(**inputs(family))
    for handle in handles:
        handle.remove()
    return [(seen_in[site.index], seen_out[site.index]) for site in sites]


def replace_all(model: PreTrainedModel) -> None:
    for site in find_ffns(model):
        site.replace(Computes(site.read()))


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_read_computes_the_familys_own_ffn(family: str) -> None:
    model = tiny_model(family)
    sites = find_ffns(model)
    assert [site.index for site in sites] == list(range(4 if family.startswith("t5") else 2))
    assert sites[1].name == NAMES.get(family, sites[1].name)
    for site, (x_TD, y_TD) in zip(sites, own_ffn_traffic(family, model), strict=True):
        ffn = site.read()
        assert (ffn.dim, ffn.width, ffn.gated) == (16, TOY_WIDTH, family in GATED)
        with torch.no_grad():
            torch.testing.assert_close(ffn(x_TD), y_TD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_replacing_by_the_same_ffn_leaves_logits(family: str) -> None:
    model, replaced = tiny_model(family), tiny_model(family)
    replace_all(replaced)
    with torch.no_grad():
        expected, logits = model(**inputs(family)).logits, replaced(**inputs(family)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_nothing_of_the_dense_ffn_stays_behind(family: str) -> None:
    model = tiny_model(family)
    dense = sum(p.numel() for p in model.parameters())
    ffns = [site.read() for site in find_ffns(model)]
    for site in find_ffns(model):
        site.replace(_Zero())
    tensors = [t for ffn in ffns for t in (getattr(ffn, n) for n in DenseFFN.__dataclass_fields__)]
    assert sum(p.numel() for p in model.parameters()) == dense - sum(
        t.numel() for t in tensors if isinstance(t, Tensor)
    )


class _Zero(nn.Module):
    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_replaced_model_generates_the_same_with_cache(family: str) -> None:
    model, replaced = tiny_model(family), tiny_model(family)
    replace_all(replaced)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs(family), **options)
    assert torch.equal(replaced.generate(**inputs(family), use_cache=True, **options), expected)
    assert torch.equal(replaced.generate(**inputs(family), use_cache=False, **options), expected)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_read_gives_views_of_live_parameters(family: str) -> None:
    model = tiny_model(family)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ffn = find_ffns(model)[0].read()
    tensors = [t for t in (getattr(ffn, name) for name in DenseFFN.__dataclass_fields__) if isinstance(t, Tensor)]
    assert len(tensors) >= 2
    assert all(t.untyped_storage().data_ptr() in storages for t in tensors)
    ffn(torch.ones(1, 16)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_works_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_model(family).config)
        ffns = [site.read() for site in find_ffns(model)]
    assert all(ffn.up_FD.is_meta and (ffn.dim, ffn.width) == (16, TOY_WIDTH) for ffn in ffns)
    assert ffns[0].activation == find_ffns(tiny_model(family))[0].read().activation


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_released_weights_leave_the_model_and_are_found_still(family: str) -> None:
    model = tiny_model(family)
    site = find_ffns(model)[0]
    ffn = site.read()
    own = list(site.parameters())
    assert sum(p.numel() for p in own) >= (3 if ffn.gated else 2) * 16 * TOY_WIDTH
    site.release()
    assert all(p.is_meta for p in site.parameters())
    assert {id(p) for p in own}.isdisjoint(id(p) for p in model.parameters())
    assert ffn(torch.ones(1, 16)).isfinite().all()
    assert len(find_ffns(model)) == 2


def test_activation_and_dropout_are_told() -> None:
    assert find_ffns(tiny_model("llama"))[0].read().activation == "silu"
    assert find_ffns(tiny_model("opt"))[0].read().activation == "relu"
    assert find_ffns(tiny_model("gpt2", resid_pdrop=0.25))[0].read().dropout == 0.25
    assert find_ffns(tiny_model("t5", dropout_rate=0.5))[0].read().dropout == 0.5
    assert find_ffns(tiny_model("bert"))[0].read().dropout == 0.0  # BERT's own stays in the layer


def test_half_precision_model_is_recognised() -> None:
    assert len(find_ffns(tiny_model("gemma").bfloat16())) == 2


def test_callback_sees_every_forward_and_nothing_afterwards() -> None:
    model = tiny_model("opt")
    sites = find_ffns(model)
    shapes: list[tuple[int, int]] = []
    with capture_inputs(sites, lambda index, x: shapes.append((index, x.shape[-1]))), torch.no_grad():
        model(**inputs("opt"))
        model(**inputs("opt"))
    model(**inputs("opt"))
    assert shapes == [(0, 16), (1, 16)] * 2


def test_input_module_follows_the_replacement() -> None:
    site = find_ffns(tiny_model("bert"))[0]
    replacement = _Zero()
    site.replace(replacement)
    assert site.input_module is replacement
    with pytest.raises(UnknownFFNError, match=r"intermediate\.dense is a _Zero, but only Linear and Conv1D"):
        site.read()


class Invented(nn.Module):
    """A family of nobody's: a fused gate behind unusual names and an activation that is a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleList(_InventedLayer() for _ in range(3))


class _InventedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed = nn.ModuleDict({"into": nn.Linear(8, 24), "out": nn.Linear(24, 8)})


def test_pattern_of_a_user() -> None:
    pattern = FFNPattern(module="stage.*.feed", up="into", down="out", activation="gelu_pytorch_tanh")
    model = Invented()
    # A ModuleDict has no forward: the pattern says what is computed, and nothing contradicts it.
    for layer in model.stage:
        layer.feed.forward = lambda x, f=layer.feed: f["out"](nn.functional.gelu(f["into"](x), approximate="tanh"))
    sites = find_ffns(model, pattern)
    assert [site.name for site in sites] == ["stage.0.feed", "stage.1.feed", "stage.2.feed"]
    x_TD = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sites[2].read()(x_TD), model.stage[2].feed.forward(x_TD), rtol=0, atol=1e-6)


def test_module_that_computes_something_else_is_refused() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: 1.5 * own(x)
    with pytest.raises(UnknownFFNError, match=r"layers\.0\.mlp \(LlamaMLP\) computes something else"):
        find_ffns(model)


def test_unknown_family_names_modules_and_shows_yaml() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnknownFFNError) as caught:
        find_ffns(model)
    message = str(caught.value)
    assert message.startswith("found no FFN in MambaForCausalLM (mamba)")
    assert "backbone.layers.*.mixer.in_proj: Linear (64, 16)" in message
    assert "ffn: {module: 'model.layers.*.mlp', gate: gate_proj" in message
    assert "layers.1" not in message


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (FFNPattern(module="model.layer.*.mlp", up="x", down="y", activation="relu"), r"nearest: 'model\.layers\.\*"),
        (
            FFNPattern(module="**.mlp", up="up_prj", down="down_proj", activation="act_fn"),
            r"model\.layers\.0\.mlp \(LlamaMLP\) has no 'up_prj'; its parts are gate_proj, up_proj, down_proj, act_fn",
        ),
        (FFNPattern(module="**.mlp", up="up_proj", down="down_proj", activation="reluu"), r"has no 'reluu'"),
        # A gated FFN described as a plain one has all its parts and computes something else.
        (FFNPattern(module="**.mlp", up="up_proj", down="down_proj", activation="act_fn"), "computes something else"),
    ],
)
def test_wrong_pattern_says_what_is_wrong(pattern: FFNPattern, message: str) -> None:
    with pytest.raises(UnknownFFNError, match=message):
        find_ffns(tiny_model("llama"), pattern)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_preactivations_are_what_the_activation_is_given_and_carry_gradients(family: str) -> None:
    model = tiny_model(family)
    sites = find_ffns(model)
    x, pre = {}, {}
    with capture_inputs(sites, x.__setitem__), capture_preactivations(sites, pre.__setitem__):
        model(**inputs(family))
    for site in sites:
        ffn = site.read()
        first_FD, bias_F = (ffn.gate_FD, ffn.gate_bias_F) if ffn.gated else (ffn.up_FD, ffn.up_bias_F)
        expected = nn.functional.linear(x[site.index], first_FD, bias_F)
        torch.testing.assert_close(pre[site.index], expected, rtol=0, atol=1e-6)
        assert pre[site.index].requires_grad


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_outputs_are_the_ffns_and_their_gradients_give_that_of_every_down_matrix(family: str) -> None:
    """dL/ddown = h^T dL/dy, so what is captured must be what the rest of the model is given."""
    model = tiny_model(family)
    sites = find_ffns(model)
    x, y = {}, {}
    with capture_inputs(sites, x.__setitem__), capture_outputs(sites, y.__setitem__):
        loss = model(**inputs(family)).logits.square().mean()
    gradients = torch.autograd.grad(loss, list(y.values()), retain_graph=True)
    loss.backward()
    for site, gradient in zip(sites, gradients, strict=True):
        ffn = site.read()
        torch.testing.assert_close(y[site.index], ffn(x[site.index]), rtol=0, atol=1e-6)
        h_TF, g_TD = ffn.hidden(x[site.index]).flatten(0, -2), gradient.flatten(0, -2)
        weight = site.down_module.weight
        down_grad_FD = weight.grad if weight.shape == ffn.down_FD.shape else weight.grad.mT
        torch.testing.assert_close(h_TF.mT @ g_TD, down_grad_FD, rtol=1e-4, atol=1e-7)


def test_hooks_are_gone_after_the_scope() -> None:
    model = tiny_model("llama")
    sites, seen = find_ffns(model), []
    with (
        capture_preactivations(sites, lambda index, _: seen.append(index)),
        capture_outputs(sites, lambda index, _: seen.append(index)),
    ):
        pass
    model(**inputs("llama")).logits.mean().backward()
    assert seen == []
