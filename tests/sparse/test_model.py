"""Sparse models as Hugging Face models: identity with the dense model, round trips, generation, training, compile."""

import copy
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import CAUSAL_FAMILIES, TOY_FAMILIES, TOY_WIDTH, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel, PreTrainedModel

from moesaic.config.strict import ConfigError
from moesaic.ffn.families import FFNPattern
from moesaic.ffn.sites import find_ffns
from moesaic.sparse.combine import Combine
from moesaic.sparse.executors import EXECUTORS
from moesaic.sparse.experts import Experts
from moesaic.sparse.layer import SparseFFN, set_budget, set_executor, sparse_layers
from moesaic.sparse.model import convert_model, load_model, sparse_classes
from moesaic.sparse.score import Linear
from moesaic.sparse.select import AllBlocks, Prefix, Selection, TopK
from moesaic.sparse.trace import record_routing

NUM_BLOCKS = 4
LABELS = {
    "contiguous": torch.arange(TOY_WIDTH) * NUM_BLOCKS // TOY_WIDTH,
    "random": torch.randperm(TOY_WIDTH, generator=torch.Generator().manual_seed(9)) % NUM_BLOCKS,
}


def layers_of(
    model: PreTrainedModel,
    *,
    labels: str = "random",
    select: Selection | None = None,
    combine: Combine | None = None,
    pattern: FFNPattern | None = None,
) -> Iterator[SparseFFN]:
    for site in find_ffns(model, pattern):
        ffn = site.read()
        experts = Experts.from_dense(ffn, LABELS[labels])
        score = Linear(activation="sigmoid").build(ffn.dim, NUM_BLOCKS)
        score.initialise(experts, None, generator=torch.Generator().manual_seed(site.index))
        combined = (combine or Combine()).build(ffn.dim, NUM_BLOCKS)
        site.release()
        yield SparseFFN(experts, score, select or AllBlocks(), combined)


def sparse_toy(
    family: str, *, k: int | None = 2, num_hidden_layers: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    model = tiny_model(family) if num_hidden_layers is None else tiny_model(family, num_hidden_layers=num_hidden_layers)
    return convert_model(model, layers_of(model, select=None if k is None else TopK(k=k), **kwargs))


def logits(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    ids = torch.arange(3, 25).view(2, 11)
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Loaded weights lie in the mapped file at any address, and matrix products may round differently there."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def assert_same_state(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype, name
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("executor", ["auto", *EXECUTORS])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_all_blocks_equal_the_dense_model(family: str, labels: str, executor: str) -> None:
    expected = logits(tiny_model(family))
    model = sparse_toy(family, k=None, labels=labels)
    set_executor(model, executor)
    assert len(sparse_layers(model)) >= 2
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_executors_agree_on_the_whole_model(family: str) -> None:
    model = sparse_toy(family, combine=Combine(weight="score"))
    set_executor(model, "masked")
    expected = logits(model)
    for executor in ("auto", "loop", "grouped", "gather"):
        set_executor(model, executor)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TOY_FAMILIES)
def test_save_and_load_is_bit_exact(family: str, tmp_path: Path) -> None:
    model = sparse_toy(family, combine=Combine(scale="fitted", fill="mean"))
    for index, layer in enumerate(sparse_layers(model)):
        layer.select = TopK(k=1 + index)  # another budget in each layer
        layer.executor = "loop"
        layer.combine.mean_BD.normal_()
        layer.combine.scale_X.normal_()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same_state(loaded, model)
    assert [(layer.select, layer.executor) for layer in sparse_layers(loaded)] == [
        (TopK(k=1 + index), "loop") for index in range(len(sparse_layers(model)))
    ]
    assert torch.equal(logits(aligned(loaded)), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "modeling_moesaic.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_half_precision_model_keeps_its_router_in_float32(family: str, tmp_path: Path) -> None:
    model = sparse_toy(family, combine=Combine(fill="mean"))
    for parameter in model.parameters():  # not model.bfloat16(): that rounds the rotary frequencies too, in any model
        parameter.data = parameter.data.bfloat16()
    for layer in sparse_layers(model):
        layer.score.float()
        layer.combine.float()
        layer.score.weight_BD.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert_same_state(loaded, model)
    assert sparse_layers(loaded)[0].score.weight_BD.dtype == torch.float32
    assert sparse_layers(loaded)[0].experts.up_BSD.dtype == torch.bfloat16
    assert torch.equal(logits(aligned(loaded)), logits(model))


def test_layers_may_differ_in_everything(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    choices: list[tuple[int, Selection, bool]] = [(3, TopK(k=1), True), (12, Prefix(k=5), False)]

    def layers() -> Iterator[SparseFFN]:
        for site, (num_blocks, select, scored) in zip(find_ffns(model), choices, strict=True):
            ffn = site.read()
            experts = Experts.from_dense(ffn, torch.arange(TOY_WIDTH) % num_blocks)
            score = Linear().build(ffn.dim, num_blocks) if scored else None
            yield SparseFFN(experts, score, select, Combine().build(ffn.dim, num_blocks))

    model = convert_model(model, layers())
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert [(layer.experts.num_blocks, layer.select) for layer in sparse_layers(loaded)] == [
        (num_blocks, select) for num_blocks, select, _ in choices
    ]
    assert sparse_layers(loaded)[1].score is None
    assert torch.equal(logits(aligned(loaded)), logits(model))


def test_a_layer_narrower_than_the_dense_one_with_a_new_bias(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def layers() -> Iterator[SparseFFN]:
        for site in find_ffns(model):
            ffn = site.read()
            experts = Experts.from_dense(ffn, torch.arange(TOY_WIDTH) // 16)
            sliced = Experts.from_dense(experts.dense_ffn(0, 1), torch.zeros(16, dtype=torch.int64))
            sliced.down_bias_D = torch.nn.Parameter(torch.ones(16))
            yield SparseFFN(sliced, None, AllBlocks(), Combine().build(ffn.dim, 1))

    model = convert_model(model, layers(), provenance={"method": "static_slice", "budget": 1})
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(logits(aligned(loaded)), logits(model))
    assert loaded.config.moesaic["provenance"] == {"method": "static_slice", "budget": 1}


def test_a_pattern_from_yaml_is_saved_with_the_model(tmp_path: Path) -> None:
    pattern = FFNPattern(
        module="model.layers.1.mlp", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"
    )
    model = tiny_model("llama")
    model = convert_model(model, layers_of(model, pattern=pattern), pattern)
    assert len(sparse_layers(model)) == 1
    model.save_pretrained(tmp_path)
    assert_same_state(load_model(tmp_path), model)


def test_conversion_works_in_place_without_copies() -> None:
    dense = tiny_model("llama")
    embeddings, attention = dense.get_input_embeddings().weight, dense.model.layers[0].self_attn
    model = convert_model(dense, layers_of(dense))
    assert model is dense
    assert model.get_input_embeddings().weight is embeddings
    assert model.model.layers[0].self_attn is attention
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config.model_type == "moesaic_llama"
    assert model.model.config is model.model.layers[0].self_attn.config is model.config


def test_conversion_frees_each_dense_ffn_before_it_asks_for_the_next_layer() -> None:
    model = tiny_model("llama")
    dense_weights = [weakref.ref(layer.mlp.up_proj.weight) for layer in model.model.layers]
    alive: list[list[bool]] = []

    def layers() -> Iterator[SparseFFN]:
        for layer in list(layers_of(tiny_model("llama"))):
            alive.append([weight() is not None for weight in dense_weights])
            yield layer

    convert_model(model, layers())
    assert alive == [[True, True], [False, True]]
    assert [weight() for weight in dense_weights] == [None, None]


@pytest.mark.parametrize(
    ("count", "message"), [(1, "2 FFNs were found, but only 1"), (3, "2 FFNs were found, but more")]
)
def test_a_wrong_number_of_layers_is_refused(count: int, message: str) -> None:
    model = tiny_model("llama")
    layers = list(layers_of(tiny_model("llama"))) * 2
    with pytest.raises(ValueError, match=message):
        convert_model(model, layers[:count])


def test_what_cannot_be_converted_says_why() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel is no causal, masked or seq2seq .* AutoModelForCausalLM"):
        convert_model(LlamaModel(tiny_model("llama").config), [])
    with pytest.raises(ValueError, match="is sparse already"):
        convert_model(sparse_toy("llama"), [])
    with pytest.raises(ValueError, match=r"no seq2seq_lm model of type 'llama'"):
        sparse_classes("llama", "seq2seq_lm")


@pytest.mark.parametrize("family", ["gpt2", "gemma", "t5"])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    model = sparse_toy(family)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


AUTO_LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "moesaic" in sys.modules and type(model).__name__ == "MoesaicLlamaForCausalLM"
torch.save(model(input_ids=torch.arange(3, 25).view(2, 11)).logits.detach(), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


def test_auto_classes_load_it_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_toy("llama")
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    arguments = [str(tmp_path / name) for name in ("saved", "logits.pt", "again")]
    subprocess.run([sys.executable, "-c", AUTO_LOADER, *arguments], check=True, capture_output=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in (tmp_path / "saved").iterdir()
    )  # in particular no copy of this package's source
    assert_same_state(load_model(tmp_path / "again"), model)


def test_the_stub_is_two_lines_and_the_config_names_it(tmp_path: Path) -> None:
    sparse_toy("t5").save_pretrained(tmp_path)
    lines = (tmp_path / "modeling_moesaic.py").read_text().split("\n")
    assert [line for line in lines if line] == [
        "from moesaic.sparse.model import sparse_classes",
        'MoesaicT5Config, MoesaicT5ForConditionalGeneration = sparse_classes("t5", "seq2seq_lm")',
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "moesaic_t5"
    assert config["auto_map"] == {
        "AutoConfig": "modeling_moesaic.MoesaicT5Config",
        "AutoModelForSeq2SeqLM": "modeling_moesaic.MoesaicT5ForConditionalGeneration",
    }


def test_registered_classes_need_no_remote_code_in_this_process(tmp_path: Path) -> None:
    model = sparse_toy("llama")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def edit_weights(folder: Path, *, drop: str = "", add: str = "") -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not drop or drop not in name}
    if add:
        weights[add] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["neuron_F", "score.weight_BD", "experts.up_BSD", "input_layernorm"])
def test_missing_weights_are_an_error(part: str, tmp_path: Path) -> None:
    sparse_toy("llama").save_pretrained(tmp_path)
    edit_weights(tmp_path, drop=part)
    with pytest.raises(ValueError, match=rf"2 missing keys \(.*{part}.*Save or convert the model again"):
        load_model(tmp_path)


def test_unexpected_weights_are_an_error(tmp_path: Path) -> None:
    sparse_toy("llama").save_pretrained(tmp_path)
    edit_weights(tmp_path, add="model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(ValueError, match=r"1 unexpected keys \(model.layers.0.mlp.gate_proj.weight\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def edit_config(folder: Path, change: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["moesaic"]["layers"][1]["select"].update(kk=1), r"moesaic\.layers\[?\.?1.*kk"),
        (lambda t: t["moesaic"]["layers"][0]["select"].update(k=9), r"k=9 exceeds"),
        (lambda t: t["moesaic"]["layers"][0].update(executor="fast"), r"executor='fast' is unknown"),
        (lambda t: t["moesaic"]["layers"][0]["score"].update(_target_="moesaic.sparse.score.Linaer"), r"Linear"),
        (lambda t: t["moesaic"].update(base="lama"), r"base='lama'"),
    ],
)
def test_a_damaged_config_is_named(change: Any, message: str, tmp_path: Path) -> None:
    sparse_toy("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_a_dense_folder_is_not_loaded_as_sparse(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'llama', which moesaic did not save"):
        load_model(tmp_path)


def test_a_config_with_fewer_layers_than_the_model_is_refused(tmp_path: Path) -> None:
    sparse_toy("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda tree: tree["moesaic"]["layers"].pop())
    with pytest.raises(ValueError, match="2 FFNs were found, but only 1 sparse layers"):
        load_model(tmp_path)


GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("family", [*CAUSAL_FAMILIES, "t5", "t5_gated"])
def test_generation_with_cache_equals_without(family: str) -> None:
    model = sparse_toy(family, combine=Combine(weight="score"))
    ids = torch.tensor([[5, 9, 13, 21]])
    cached = model.generate(ids, **GENERATE, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **GENERATE, use_cache=False))
    assert cached.shape[1] >= 8


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_left_padded_batch_generates_what_single_prompts_do(family: str) -> None:
    model = sparse_toy(family, combine=Combine(weight="score"))
    prompts = [[5, 9, 13, 21, 7], [11, 3]]
    batch = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **GENERATE)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), **GENERATE)
        assert row[5:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("executor", ["auto", "masked", "loop", "grouped", "gather"])
def test_trains_under_autocast(family: str, executor: str) -> None:
    model = sparse_toy(family, combine=Combine(weight="score")).train()
    set_executor(model, executor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 23).view(2, 10)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(model) as trace:
            loss = model(input_ids=ids, labels=ids).loss
        assert trace.layers[0][0].score_TB.dtype == torch.float32
        loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for layer in sparse_layers(model) for p in layer.parameters()
        )
        assert sparse_layers(model)[0].score.weight_BD.grad.any()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_deepcopy_is_independent() -> None:
    model = sparse_toy("llama")
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(twin), expected)
    set_budget(twin, 0)
    twin.get_input_embeddings().weight.data.zero_()
    assert torch.equal(logits(model), expected)


def test_models_can_be_pickled() -> None:
    model = sparse_toy("gpt2")
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.parametrize("executor", ["masked", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(executor: str, dtype: torch.dtype) -> None:
    layer = sparse_layers(sparse_toy("llama", combine=Combine(weight="score")).to(dtype))[0]
    layer.executor = executor
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


@pytest.mark.parametrize("executor", ["loop", "gather"])
def test_compiles_with_graph_breaks(executor: str) -> None:
    layer = sparse_layers(sparse_toy("llama"))[0]
    layer.executor = executor
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_inductor_compiles_the_whole_model() -> None:
    model = sparse_toy("llama", num_hidden_layers=1)
    expected = logits(model, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, use_cache=False), expected, atol=1e-5, rtol=1e-4)
