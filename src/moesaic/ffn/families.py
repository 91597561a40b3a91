"""Where each model family keeps its FFN: patterns of module names, not of classes.

A pattern is plain data, so a user's YAML can describe a family that is not built in (`backbone.ffn`).
"""

import re
from dataclasses import dataclass

__all__ = ["BUILT_IN_PATTERNS", "FFNPattern", "matches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNPattern:
    """How to recognise the FFN modules of a model and the parts inside each.

    `module` is matched against whole module names: `*` stands for one dotted part, `**` for any number of them. The
    other fields are names inside that module, dotted if need be: `up` and `down` (and `gate` in a gated FFN) are linear
    layers; `gate_up` replaces `gate` and `up` where one layer computes both, gate first. `activation` is the name of an
    attribute that holds the activation, or a name in transformers' `ACT2FN`. `inline` says that the module holds
    more than the FFN (OPT and BERT layers): then only its parts are exchanged, never the module.
    Raises ValueError for a combination that describes no FFN.
    """

    module: str
    down: str
    activation: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    inline: bool = False

    def __post_init__(self) -> None:
        if (self.up is None) == (self.gate_up is None):
            raise ValueError("an FFN pattern needs either `up` (with `gate` if gated) or the fused `gate_up`")
        if self.gate is not None and self.gate_up is not None:
            raise ValueError("`gate` and `gate_up` are both given: `gate_up` is one layer that computes gate and up")
        if self.inline and self.up is None:
            raise ValueError("`inline` needs `up`: the replacement takes the place of that layer")
        if self.inline and self.gate is not None:
            raise ValueError("`inline` cannot be gated: the layer would still multiply by its gate after the exchange")
        if not self.module.strip("*."):
            raise ValueError(f"`module: {self.module}` matches every module; name at least one part, as in '**.mlp'")

    @property
    def linears(self) -> dict[str, str]:
        """The linear layers by role: {"gate": ..., "up": ..., "down": ...} or {"gate_up": ..., "down": ...}."""
        roles = {"gate": self.gate, "up": self.up, "gate_up": self.gate_up, "down": self.down}
        return {role: name for role, name in roles.items() if name is not None}


BUILT_IN_PATTERNS: dict[str, FFNPattern] = {
    "llama, mistral, qwen, gemma": FFNPattern(
        module="**.mlp", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"
    ),
    "phi-3": FFNPattern(module="**.mlp", gate_up="gate_up_proj", down="down_proj", activation="activation_fn"),
    "gpt-2": FFNPattern(module="**.mlp", up="c_fc", down="c_proj", activation="act"),
    "gpt-neox": FFNPattern(module="**.mlp", up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
    "opt": FFNPattern(module="**.layers.*", up="fc1", down="fc2", activation="activation_fn", inline=True),
    "bert, roberta": FFNPattern(
        module="**.layer.*",
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        inline=True,
    ),
    "t5 v1.0": FFNPattern(module="**.DenseReluDense", up="wi", down="wo", activation="act"),
    "t5 v1.1": FFNPattern(module="**.DenseReluDense", gate="wi_0", up="wi_1", down="wo", activation="act"),
}


def matches(glob: str, name: str) -> bool:
    """Whether a dotted module name matches a glob in which `*` is one part (or a piece of it) and `**` any number."""
    parts = [r"(?:[^.]+\.)*" if part == "**" else _part_regex(part) + r"\." for part in glob.split(".")]
    return re.fullmatch("".join(parts), name + ".") is not None


def _part_regex(part: str) -> str:
    return "[^.]*".join(re.escape(piece) for piece in part.split("*"))
