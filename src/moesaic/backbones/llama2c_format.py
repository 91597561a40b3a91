"""llama2.c's legacy `.bin` checkpoints, read without copying them.

Source: karpathy/llama2.c, export.py `legacy_export` and run.c `memory_map_weights`.
Shapes: V vocabulary, D model dim, F FFN width, L layers, H query heads, K key and value heads, P half a head's dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.backbones.base import BackboneError

__all__ = ["Header", "half_split", "read_header", "state_dict_of"]

_HEADER_BYTES = 28
_VERSIONED_MAGIC = 0x616B3432  # "ak42": export versions 1 and 2


_SAME_LAYOUT = {
    "attention_norm": "input_layernorm",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The seven sizes a checkpoint begins with; `tied` is the sign of its vocabulary size."""

    dim: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int
    tied: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every array of the file in file order, by llama2.c's name."""
        layers, dim, kv_dim = self.num_layers, self.dim, self.num_kv_heads * (self.dim // self.num_heads)
        rope = (self.context, self.dim // self.num_heads // 2)
        return {
            "tok_embeddings": (self.vocab_size, dim),
            "attention_norm": (layers, dim),
            "wq": (layers, dim, dim),
            "wk": (layers, kv_dim, dim),
            "wv": (layers, kv_dim, dim),
            "wo": (layers, dim, dim),
            "ffn_norm": (layers, dim),
            "w1": (layers, self.width, dim),
            "w2": (layers, dim, self.width),
            "w3": (layers, self.width, dim),
            "norm": (dim,),
            "freqs_cos": rope,
            "freqs_sin": rope,
        } | ({} if self.tied else {"output": (self.vocab_size, dim)})

    @property
    def file_bytes(self) -> int:
        """The size of a whole file with this header."""
        return _HEADER_BYTES + 4 * sum(math.prod(shape) for shape in self.shapes.values())


def read_header(path: Path) -> Header:
    """The header of a checkpoint whose size agrees with it.

    Raises BackboneError, with what the header promises and what the file holds, for any other file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise BackboneError(f"cannot read {path}: {error.strerror}. Give a llama2.c .bin checkpoint.") from error
    if len(start) < _HEADER_BYTES:
        raise BackboneError(f"{path} has {size} bytes, but a llama2.c header alone has {_HEADER_BYTES}.")
    numbers = [int(number) for number in np.frombuffer(start, "<i4")]
    if numbers[0] == _VERSIONED_MAGIC:
        raise BackboneError(
            f"{path} is a version {numbers[1]} export; only the legacy format is read (export --version 0)."
        )
    dim, width, num_layers, num_heads, num_kv_heads, vocab_size, context = numbers
    header = Header(
        dim=dim,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=abs(vocab_size),
        context=context,
        tied=vocab_size > 0,
    )
    _check_sizes(header, path)
    if size != header.file_bytes:
        raise BackboneError(
            f"{path} has {size} bytes, but its header ({_told(header)}) promises {header.file_bytes}: it is "
            f"{'cut off' if size < header.file_bytes else 'followed by something else'}. Download or export it again."
        )
    return header


def state_dict_of(path: Path, header: Header) -> dict[str, Tensor]:
    """The checkpoint as the float32 state dict of a Hugging Face Llama; all but wq and wk are views of the mapped file.

    `lm_head.weight` is there only where it is not the embedding.
    """
    arrays = dict(_arrays(path, header))
    state = {"model.embed_tokens.weight": arrays["tok_embeddings"], "model.norm.weight": arrays["norm"]}
    if not header.tied:
        state["lm_head.weight"] = arrays["output"]
    for layer in range(header.num_layers):
        prefix = f"model.layers.{layer}"
        state[f"{prefix}.self_attn.q_proj.weight"] = half_split(arrays["wq"][layer], header.num_heads)
        state[f"{prefix}.self_attn.k_proj.weight"] = half_split(arrays["wk"][layer], header.num_kv_heads)
        for theirs, ours in _SAME_LAYOUT.items():
            state[f"{prefix}.{ours}.weight"] = arrays[theirs][layer]
    return state


def half_split(weight_RD: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix reordered for half-split RoPE: in each head, pairs (2i, 2i+1) become (i, i+P)."""
    dim = weight_RD.shape[1]
    weight_HP2D = weight_RD.reshape(num_heads, -1, 2, dim)
    return weight_HP2D.transpose(1, 2).reshape(-1, dim)


def _arrays(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    # Copy-on-write: torch wants writable memory, and the file stays as it is.
    flat = np.memmap(path, dtype="<f4", mode="c", offset=_HEADER_BYTES)
    first = 0
    for name, shape in header.shapes.items():
        count = math.prod(shape)
        yield name, torch.from_numpy(flat[first : first + count].reshape(shape))
        first += count


def _check_sizes(header: Header, path: Path) -> None:
    sizes = (header.dim, header.width, header.num_layers, header.num_heads, header.num_kv_heads, header.context)
    plausible = (
        min(*sizes, header.vocab_size) > 0
        and header.dim % (2 * header.num_heads) == 0
        and header.num_heads % header.num_kv_heads == 0
    )
    if not plausible:
        raise BackboneError(
            f"{path} does not begin like a llama2.c checkpoint: read as its header, it says {_told(header)}. "
            "All must be positive, dim a multiple of twice the heads and the heads a multiple of the key heads."
        )


def _told(header: Header) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(header).items())
