"""Toy models: every FFN family that moesaic knows, with seeded random weights, built in milliseconds."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = [
    "CAUSAL_FAMILIES",
    "TOY_CONTEXT",
    "TOY_FAMILIES",
    "TOY_LABELS",
    "TOY_VOCAB",
    "TOY_WIDTH",
    "tiny_model",
    "tiny_tokenizer",
]

TOY_VOCAB = 64
TOY_CONTEXT = 64
TOY_WIDTH = 48  # F of every toy; D is 16
TOY_LABELS = 3  # of the classifiers

_TOKENS = {"vocab_size": TOY_VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": TOY_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": TOY_CONTEXT,
}
_BERT = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": TOY_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOY_CONTEXT,
}
_T5 = {
    "vocab_size": TOY_VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "d_model": 16,
    "d_ff": TOY_WIDTH,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
}
_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 8}),
    "phi3": ("phi3", _LLAMA),
    "gpt2": (
        "gpt2",
        {**_TOKENS, "n_embd": 16, "n_inner": TOY_WIDTH, "n_layer": 2, "n_head": 2, "n_positions": TOY_CONTEXT},
    ),
    "opt": (
        "opt",
        {
            **_TOKENS,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": TOY_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOY_CONTEXT,
        },
    ),
    "gpt_neox": ("gpt_neox", _BERT),
}
_MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", {**_BERT, "max_position_embeddings": TOY_CONTEXT + 2}),
}
_SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {**_T5, "feed_forward_proj": "relu"}),
    "t5_gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu"}),
}
_CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_classifier": ("bert", {**_BERT, "num_labels": TOY_LABELS}),
    "roberta_classifier": ("roberta", {**_MASKED["roberta"][1], "num_labels": TOY_LABELS}),
}
CAUSAL_FAMILIES: tuple[str, ...] = tuple(_CAUSAL)
TOY_FAMILIES: tuple[str, ...] = (*_CAUSAL, *_MASKED, *_SEQ2SEQ, *_CLASSIFIERS)


def tiny_model(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A model of `family` in eval mode: D 16, F 48, 2 layers, vocabulary 64, context 64, float32.

    Equal seeds give equal weights; the global random state is left as it was. Biases and norms are random too, so
    that forgetting one shows. `config_overrides` are keyword arguments of the family's Hugging Face config.
    """
    groups: list[tuple[dict[str, tuple[str, dict[str, Any]]], Callable[..., PreTrainedModel]]] = [
        (_CAUSAL, AutoModelForCausalLM.from_config),
        (_MASKED, AutoModelForMaskedLM.from_config),
        (_SEQ2SEQ, AutoModelForSeq2SeqLM.from_config),
        (_CLASSIFIERS, AutoModelForSequenceClassification.from_config),
    ]
    for families, from_config in groups:
        if family in families:
            model_type, kwargs = families[family]
            with torch.random.fork_rng(devices=[]):
                model = from_config(CONFIG_MAPPING[model_type](**{**kwargs, **config_overrides}))
            return _randomise(model, seed).eval()
    raise ValueError(f"no toy named {family!r}; there are {', '.join(TOY_FAMILIES)}")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """64 words `w1 w2 ...` split at spaces; number 0 is `<s>`, which also ends, pads and stands for the unknown."""
    vocabulary = {"<s>": 0, **{f"w{i}": i for i in range(1, TOY_VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{role}_token": "<s>" for role in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model
