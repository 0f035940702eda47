"""Fused experts, taken apart: one linear layer per expert and projection, so that each can be packed.

transformers keeps the weights of all experts of a block in parameters of three dimensions, gate_up_proj
(n_experts, 2 width, in) and down_proj (n_experts, in, width), and runs them by one of several functions of one
contract (`transformers.integrations.moe`). For token t with its chosen experts e and their weights p,

    y_t = sum_e p_te down_e(gate(gate_up_e(x_t)))

`UnfusedExperts` keeps that contract. Its layers are `<experts>.<e>.gate_up_proj` (`up_proj` without a gate) and
`<experts>.<e>.down_proj`; before they are packed their weights are views of the fused ones and take no memory. The
gate is the family's own. Experts of one token are summed at once, not into a running sum, so the order is fixed. Which
experts run is read from the routing: one synchronisation per call on a GPU, and no one graph of the whole forward.

What has another contract (Llama 4) is not taken apart. Expert parallelism is not supported.
"""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.guard import FUSED_SHAPE

DOWN = "down_proj"
FLAGS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class ExpertLayer:
    """One projection of one expert.

    Attributes:
        expert: its number.
        projection: "gate_up_proj", "up_proj" or "down_proj".
        in_features: inputs.
        out_features: outputs.
        n_bytes: bytes of its weight now.
    """

    expert: int
    projection: str
    in_features: int
    out_features: int
    n_bytes: int


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts of the contract above."""
    if not all(hasattr(module, flag) for flag in FLAGS):
        return False
    expected = {_up(module), DOWN}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    own = dict(module.named_parameters(recurse=False))
    return own.keys() == expected and own[DOWN].ndim == own[_up(module)].ndim == 3


def layers_of(experts: nn.Module) -> Iterator[ExpertLayer]:
    """The layers that fused experts are taken apart into."""
    weights: dict[str, Any] = {name: getattr(experts, name) for name in (_up(experts), DOWN)}
    for expert in range(len(weights[DOWN])):
        for name, weight in weights.items():
            shape = tuple(weight.shape[1:])
            out_features, in_features = reversed(shape) if experts.is_transposed else shape
            n_bytes = out_features * in_features * weight.element_size()
            yield ExpertLayer(expert, name, in_features, out_features, n_bytes)


class UnfusedExperts(nn.Module):
    """Experts as linear layers, in the place of a module of fused experts.

    Children: "0", "1", ..., each with its projections; and the children of the fused module (activation, norm).
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        rules = copy.copy(fused)
        rules._parameters = dict.fromkeys(fused._parameters)
        self.up = _up(fused)
        self.n_experts = len(getattr(fused, self.up))
        # In a tuple, so that it is no child: what it holds is registered here, and its weights are gone.
        self._rules: tuple[Any] = (rules,)
        for expert in range(self.n_experts):
            layers = {name: _linear(fused, name, expert) for name in (self.up, DOWN)}
            self.add_module(str(expert), nn.ModuleDict(layers))
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the chosen experts make of each token, in the dtype of the tokens.

        Args:
            hidden_states: (n_tokens, in_features).
            top_k_index: (n_tokens, n_chosen) int64, the chosen experts.
            top_k_weights: (n_tokens, n_chosen), their weights.
        """
        n_tokens, n_chosen = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.n_experts).tolist()
        rows = hidden_states[order // n_chosen]  # (n_tokens * n_chosen, in_features), by expert
        made = [self.expert(e, part) for e, part in enumerate(rows.split(counts)) if len(part)]
        if not made:
            return torch.zeros_like(hidden_states)
        weighted = torch.cat(made) * top_k_weights.reshape(-1)[order, None]
        by_token = weighted[order.argsort()].view(n_tokens, n_chosen, -1)
        return by_token.sum(dim=1).to(hidden_states.dtype)

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """What one expert makes of its tokens, (n_rows, in_features)."""
        out = self.layer(number, DOWN)(self.inner(number, rows))
        rules = self._rules[0]
        return rules.post_expert_norm(out) if getattr(rules, "has_post_expert_norm", False) else out

    def inner(self, number: int, rows: Tensor) -> Tensor:
        """The inputs of an expert's last projection, (n_rows, width)."""
        rules, projected = self._rules[0], self.layer(number, self.up)(rows)
        return rules._apply_gate(projected) if rules.has_gate else rules.act_fn(projected)

    def layer(self, number: int, projection: str) -> nn.Module:
        """A projection of an expert: nn.Linear, or packed."""
        return self.get_submodule(f"{number}.{projection}")

    def layer_names(self) -> list[str]:
        """Paths of the layers in this module, expert by expert."""
        return [f"{expert}.{name}" for expert in range(self.n_experts) for name in (self.up, DOWN)]

    @property
    def down_proj(self) -> nn.Parameter:
        """What a checkpoint holds under the name of the fused weights (`vlmq.guard`); transformers reads its shape."""
        return nn.Parameter(torch.empty(FUSED_SHAPE, dtype=torch.uint8, device="meta"), requires_grad=False)

    gate_up_proj = up_proj = down_proj

    def fused(self) -> nn.Module:
        """Fused experts of the same weights, all of which must be nn.Linear."""
        fused = copy.copy(self._rules[0])
        fused._parameters = dict(fused._parameters)
        for name in (self.up, DOWN):
            layers: list[Any] = [self.layer(expert, name) for expert in range(self.n_experts)]
            weight = torch.stack([layer.weight.detach() for layer in layers])
            fused._parameters[name] = nn.Parameter(weight.mT.contiguous() if fused.is_transposed else weight)
            if fused.has_bias:
                bias = torch.stack([layer.bias.detach() for layer in layers])
                fused._parameters[f"{name}_bias"] = nn.Parameter(bias)
        return fused


def unfuse(model: nn.Module, layers: Collection[str]) -> dict[str, nn.Module]:
    """Take apart, in place, the fused experts that hold any of the layers named.

    Args:
        model: may lie on the meta device.
        layers: full names of linear layers; those that belong to no fused experts are passed over.

    Returns:
        {path: the module of fused experts that was there}.
    """
    paths = {path for name in layers if (path := owner(name))}
    found = {}
    for path in sorted(paths):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if is_fused(module):
            found[path] = module
            model.set_submodule(path, UnfusedExperts(module))
    return found


def owner(layer: str) -> str | None:
    """Path of the experts that a layer would belong to by its name; None for any other name."""
    *path, number, _ = layer.rsplit(".", 2) if layer.count(".") > 1 else ("", "")
    return path[0] if path and number.isdecimal() else None


def _up(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _linear(fused: nn.Module, name: str, expert: int) -> nn.Linear:
    """A linear layer of one expert: its weight is a view, its bias a copy."""
    weight: Tensor = getattr(fused, name)[expert].detach()
    weight = weight.mT if fused.is_transposed else weight
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        layer.bias = nn.Parameter(
            getattr(fused, f"{name}_bias")[expert].detach().clone(), requires_grad=False
        )
    return layer
