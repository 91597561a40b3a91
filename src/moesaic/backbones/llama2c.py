"""A Llama in llama2.c's `.bin` format, imported into an ordinary Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.backbones.base import Backbone
from moesaic.backbones.files import content_hash
from moesaic.backbones.llama2c_format import Header, read_header, state_dict_of
from moesaic.backbones.llama2c_tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.data.tokens import TokenSplit

__all__ = ["Llama2c"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama2c(Backbone):
    """`checkpoint` is a legacy (version 0) export, `tokenizer` llama2.c's `tok*.bin` or a sentencepiece `.model`."""

    checkpoint: Path
    tokenizer: Path

    def fingerprint(self) -> str:
        read_header(self.checkpoint)
        return content_hash([self.checkpoint, self.tokenizer])

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return LlamaForCausalLM(_config(read_header(self.checkpoint)))

    def materialise(
        self, folder: Path, *, tokens: TokenSplit | None, tokenizer: PreTrainedTokenizerFast | None, seed: int
    ) -> None:
        header = read_header(self.checkpoint)
        own = read_tokenizer(self.tokenizer, vocab_size=header.vocab_size, context=header.context)
        state = {name: tensor.contiguous() for name, tensor in state_dict_of(self.checkpoint, header).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        own.save_pretrained(folder)
        _config(header).save_pretrained(folder)


def _config(header: Header) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=header.dim,
        intermediate_size=header.width,
        num_hidden_layers=header.num_layers,
        num_attention_heads=header.num_heads,
        num_key_value_heads=header.num_kv_heads,
        vocab_size=header.vocab_size,
        max_position_embeddings=header.context,
        tie_word_embeddings=header.tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # llama2.c ends a text with the token that also begins one.
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,  # never in a text: there are bytes for all that is unknown
        dtype="float32",
    )
