"""Find the FFNs of a live model, read their weights, listen to their inputs and put other modules in their places.

Shapes: D model dim, F FFN width.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moesaic.ffn.activations import activation_name
from moesaic.ffn.dense import DenseFFN
from moesaic.ffn.families import BUILT_IN_PATTERNS, FFNPattern, matches

__all__ = [
    "FFNSite",
    "UnknownFFNError",
    "capture_inputs",
    "capture_outputs",
    "capture_preactivations",
    "find_ffns",
]

_MOST_NAMES_SHOWN = 40


class UnknownFFNError(ValueError):
    """A model whose FFNs no pattern describes, or describes wrongly; the message says how to write one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSite:
    """One FFN in a live model.

    `index` counts the model's FFNs in module order, `name` is the dotted name of the module that holds it.
    """

    index: int
    name: str
    root: nn.Module
    pattern: FFNPattern

    def read(self) -> DenseFFN:
        """Its weights, neuron by neuron: views of the live parameters (also on the meta device).

        Raises UnknownFFNError if a part is not a linear layer (quantised, or already replaced) or if the activation is
        not one that transformers names.
        """
        (gate_FD, gate_bias_F), (up_FD, up_bias_F) = self._gate_and_up()
        down_DF, down_bias_D = self._linear(self.pattern.down)
        return DenseFFN(
            gate_FD=gate_FD,
            up_FD=up_FD,
            down_FD=down_DF.mT,
            gate_bias_F=gate_bias_F,
            up_bias_F=up_bias_F,
            down_bias_D=down_bias_D,
            activation=self._activation(),
            dropout=self._dropout(),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of its linear layers, each once."""
        for name in self.pattern.linears.values():
            yield from self._module(name).parameters()

    def release(self) -> None:
        """Give its weights back to the allocator: the layers stay, on the meta device, until they are replaced.

        What `read()` returned earlier keeps them alive; a model with a released FFN cannot run.
        """
        for name in self.pattern.linears.values():
            self._module(name).to("meta")

    @property
    def preactivation_module(self) -> nn.Module:
        """The linear layer whose output the activation is given; a fused one computes gate and up, gate first."""
        part = self.pattern.gate or self.pattern.gate_up or self.pattern.up
        assert part is not None  # the pattern checked itself
        return self._module(part)

    @property
    def down_module(self) -> nn.Module:
        """The linear layer whose output is the FFN's, before the model's own dropout."""
        return self._module(self.pattern.down)

    @property
    def input_module(self) -> nn.Module:
        """The module whose forward gets the FFN's input (..., D) as its first argument, also after `replace`."""
        return self.root.get_submodule(self._place)

    def replace(self, module: nn.Module) -> None:
        """Put `module`, which maps (..., D) to (..., D), in the FFN's place.

        In an inline pattern it takes the place of the up layer; activation and down layer become identities.
        """
        self.root.set_submodule(self._place, module)
        if self.pattern.inline:
            holder = self.root.get_submodule(self.name)
            for part in (self.pattern.activation, self.pattern.down):
                parent, _, leaf = part.rpartition(".")
                setattr(holder.get_submodule(parent), leaf, nn.Identity())

    @property
    def _place(self) -> str:
        return f"{self.name}.{self.pattern.up}" if self.pattern.inline else self.name

    def _gate_and_up(self) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]:
        if self.pattern.gate_up is not None:
            weight, bias = self._linear(self.pattern.gate_up)
            gate_FD, up_FD = weight.chunk(2)
            gate_bias_F, up_bias_F = (None, None) if bias is None else bias.chunk(2)
            return (gate_FD, gate_bias_F), (up_FD, up_bias_F)
        assert self.pattern.up is not None  # the pattern checked itself
        up = self._linear(self.pattern.up)
        return (None, None) if self.pattern.gate is None else self._linear(self.pattern.gate), up

    def _module(self, part: str) -> nn.Module:
        return self.root.get_submodule(f"{self.name}.{part}")

    def _linear(self, part: str) -> tuple[Tensor, Tensor | None]:
        module = self._module(part)
        if isinstance(module, Conv1D):
            return module.weight.mT, module.bias
        if isinstance(module, nn.Linear):
            return module.weight, module.bias
        raise UnknownFFNError(
            f"{self.name}.{part} is a {type(module).__name__}, but only Linear and Conv1D layers can be read; "
            "load the model without quantisation, and read an FFN before it is replaced"
        )

    def _activation(self) -> str:
        holder = self.root.get_submodule(self.name)
        function = _attribute(holder, self.pattern.activation)
        try:
            return self.pattern.activation if function is None else activation_name(function)
        except ValueError as error:
            raise UnknownFFNError(f"{self.name}.{self.pattern.activation}: {error}") from error

    def _dropout(self) -> float:
        if self.pattern.inline:  # its dropout stays in the layer, outside what is replaced
            return 0.0
        parts = self.root.get_submodule(self.name).children()
        return max((part.p for part in parts if isinstance(part, nn.Dropout)), default=0.0)


def find_ffns(model: nn.Module, pattern: FFNPattern | None = None) -> list[FFNSite]:
    """All FFNs of a model in module order (an encoder's before its decoder's), by `pattern` or by the built-in ones.

    Raises UnknownFFNError if none is found, naming the modules seen and how to describe them in YAML, or if a module
    computes something else than the weights that the pattern names.
    """
    patterns = BUILT_IN_PATTERNS.values() if pattern is None else (pattern,)
    sites: list[FFNSite] = []
    for name, module in model.named_modules():
        for candidate in patterns:
            if matches(candidate.module, name) and not _missing_parts(module, candidate):
                sites.append(FFNSite(index=len(sites), name=name, root=model, pattern=candidate))
                break
    if not sites:
        raise UnknownFFNError(_nothing_found(model, pattern))
    for checked in {site.pattern: site for site in reversed(sites)}.values():
        _check_output(checked)
    return sites


@contextmanager
def capture_inputs(sites: Sequence[FFNSite], callback: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `callback(site.index, x)` runs on each forward of each site with its input x (..., D), as it is."""

    def listener(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _module, args, kwargs: callback(index, args[0] if args else next(iter(kwargs.values())))

    handles = [
        site.input_module.register_forward_pre_hook(listener(site.index), with_kwargs=True, prepend=True)
        for site in sites
    ]
    with _removed(handles):
        yield


@contextmanager
def capture_preactivations(sites: Sequence[FFNSite], callback: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `callback(site.index, pre)` runs on each forward of each dense site, gradients attached.

    `pre` (..., F) is what the activation is given: of the gate branch in a gated FFN.
    """

    def listener(site: FFNSite) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        branches = 2 if site.pattern.gate_up is not None else 1
        return lambda _module, _args, output: callback(site.index, output.chunk(branches, dim=-1)[0])

    with _removed([site.preactivation_module.register_forward_hook(listener(site)) for site in sites]):
        yield


@contextmanager
def capture_outputs(sites: Sequence[FFNSite], callback: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `callback(site.index, y)` runs on each forward of each dense site with its output y (..., D).

    Gradients are attached. The output is that of the down layer, before the model's own dropout.
    """

    def listener(index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _module, _args, output: callback(index, output)

    with _removed([site.down_module.register_forward_hook(listener(site.index)) for site in sites]):
        yield


@contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that go when the scope is left."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attribute(module: nn.Module, dotted: str) -> Any:
    """The attribute, or None where it does not exist."""
    value: Any = module
    for part in dotted.split("."):
        value = getattr(value, part, None)
    return value


def _missing_parts(module: nn.Module, pattern: FFNPattern) -> list[str]:
    missing = [part for part in pattern.linears.values() if not isinstance(_attribute(module, part), nn.Module)]
    named = pattern.activation in ACT2FN and not pattern.inline  # inline: there must be something to switch off
    if not named and _attribute(module, pattern.activation) is None:
        missing.append(pattern.activation)
    return missing


def _check_output(site: FFNSite) -> None:
    """Some families have all the right parts and multiply or prune in between: found out on three random tokens."""
    module = site.root.get_submodule(site.name)
    ffn = site.read()
    if site.pattern.inline or ffn.up_FD.is_meta or (module.training and ffn.dropout):
        return
    x_TD = torch.randn(3, ffn.dim, generator=torch.Generator().manual_seed(0)).to(ffn.up_FD)
    with torch.no_grad():
        expected_TD, y_TD = module(x_TD), ffn(x_TD)
    error, size = (y_TD - expected_TD).abs().max(), expected_TD.abs().max()
    if not error <= 0.02 * size:  # half precision, kernels that sum in another order
        raise UnknownFFNError(
            f"{site.name} ({type(module).__name__}) computes something else than its {', '.join(site.pattern.linears)} "
            f"layers and activation say: outputs differ by {error:.3g} of {size:.3g}. Such FFNs cannot be converted."
        )


def _nothing_found(model: nn.Module, pattern: FFNPattern | None) -> str:
    family = getattr(getattr(model, "config", None), "model_type", "no model_type")
    head = f"found no FFN in {type(model).__name__} ({family})"
    if pattern is not None:
        return f"{head}: {_why_not(model, pattern)}\n{_modules_seen(model)}"
    known = ", ".join(BUILT_IN_PATTERNS)
    return (
        f"{head}. Built-in families: {known}.\n{_modules_seen(model)}\n"
        "Describe where its FFNs are in the backbone's YAML, for example:\n"
        "  ffn: {module: 'model.layers.*.mlp', gate: gate_proj, up: up_proj, down: down_proj, activation: act_fn}\n"
        "(`*` is one part of a name and `**` any number; leave out `gate` for a plain FFN; `gate_up` instead of gate\n"
        "and up where one layer computes both; `activation` is an attribute or a name such as relu)"
    )


def _why_not(model: nn.Module, pattern: FFNPattern) -> str:
    hits = [(name, module) for name, module in model.named_modules() if matches(pattern.module, name)]
    if not hits:
        names = {_numberless(name) for name, _ in model.named_modules()}
        nearest = difflib.get_close_matches(pattern.module, names, n=1, cutoff=0.0)
        return f"no module is named {pattern.module!r}; nearest: {nearest[0]!r}"
    name, module = hits[0]
    parts = [part for part, _ in module.named_modules() if part]
    lacks = ", ".join(repr(part) for part in _missing_parts(module, pattern))
    return f"{name} ({type(module).__name__}) has no {lacks}; its parts are {', '.join(parts)}"


def _modules_seen(model: nn.Module) -> str:
    lines = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not list(module.children()) and isinstance(weight, Tensor) and weight.ndim == 2:
            lines[_numberless(name)] = f"  {_numberless(name)}: {type(module).__name__} {tuple(weight.shape)}"
    shown = list(lines.values())[:_MOST_NAMES_SHOWN]
    if len(lines) > len(shown):
        shown.append(f"  ... and {len(lines) - len(shown)} more")
    return "Modules seen (weight shape):\n" + "\n".join(shown)


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
