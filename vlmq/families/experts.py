"""Fused experts, taken apart: one linear layer per expert and projection, so that each can be packed.

transformers keeps the weights of all experts of a block in parameters of three dimensions, gate_up_proj
(n_experts, 2 width, in) and down_proj (n_experts, in, width), and runs them by one of several functions of one
contract (`transformers.integrations.moe`). For token t with its chosen experts e and their weights p,

    y_t = sum_e p_te down_e(gate(gate_up_e(x_t)))

`UnfusedExperts` keeps that contract. Its layers are `<experts>.<e>.gate_up_proj` (`up_proj` without a gate) and
`<experts>.<e>.down_proj`; before they are packed their weights are views of the fused ones and take no memory. The
gate is the family's own. Experts of one token are summed at once, not into a running sum, so the order is fixed. Which
experts run is read from the routing: one synchronisation per call on a GPU, and no one graph of the whole forward.

Modules of the same contract that do not say so by attributes are in `CONTRACTS`. Llama 4's experts get the tokens once
per expert, one stack after the other, multiplied with their weights and zero where the router sends none:
`SortedExperts`.
What has yet another contract is not taken apart. Expert parallelism is not supported.
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
class Contract:
    """How fused experts hold their weights.

    Attributes:
        has_gate: gate and up in one projection, "gate_up_proj"; otherwise there is "up_proj" only.
        has_bias: both projections have one.
        is_transposed: weights are (n_experts, in_features, out_features).
        is_sorted: the tokens come once per expert, without a routing.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_sorted: bool = False

    @property
    def up(self) -> str:
        """Name of the first projection."""
        return "gate_up_proj" if self.has_gate else "up_proj"


# Classes without the attributes that transformers' decorator gives.
CONTRACTS = {
    "Llama4TextExperts": Contract(has_gate=True, has_bias=False, is_transposed=True, is_sorted=True),
    "Step3p7Experts": Contract(has_gate=True, has_bias=False, is_transposed=False),
}


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
    """Whether a module holds fused experts of a contract above."""
    contract = contract_of(module)
    if contract is None:
        return False
    expected = {contract.up, DOWN}
    if contract.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    own = dict(module.named_parameters(recurse=False))
    return own.keys() == expected and own[DOWN].ndim == own[contract.up].ndim == 3


def contract_of(module: Any) -> Contract | None:
    """How a module that may hold fused experts says that it holds them; None if it does not."""
    if all(hasattr(module, flag) for flag in FLAGS):
        return Contract(module.has_gate, module.has_bias, module.is_transposed)
    return CONTRACTS.get(type(module).__name__)


def layers_of(experts: nn.Module) -> Iterator[ExpertLayer]:
    """The layers that fused experts are taken apart into."""
    contract = _known_contract(experts)
    weights: dict[str, Any] = {name: getattr(experts, name) for name in (contract.up, DOWN)}
    for expert in range(len(weights[DOWN])):
        for name, weight in weights.items():
            shape = tuple(weight.shape[1:])
            out_features, in_features = reversed(shape) if contract.is_transposed else shape
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
        self.contract = _known_contract(fused)
        self.up = self.contract.up
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

    def routed(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, chosen experts (-1 for none) and their weights, from the arguments of `forward`."""
        return hidden_states, top_k_index, top_k_weights

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """What one expert makes of its tokens, (n_rows, in_features)."""
        out = self.layer(number, DOWN)(self.inner(number, rows))
        rules = self._rules[0]
        return rules.post_expert_norm(out) if getattr(rules, "has_post_expert_norm", False) else out

    def inner(self, number: int, rows: Tensor) -> Tensor:
        """The inputs of an expert's last projection, (n_rows, width)."""
        rules, projected = self._rules[0], self.layer(number, self.up)(rows)
        if not self.contract.has_gate:
            return rules.act_fn(projected)
        if hasattr(rules, "_apply_gate"):
            return rules._apply_gate(projected)
        gate, up = projected.chunk(2, dim=-1)
        return up * rules.act_fn(gate)

    def layer(self, number: int, projection: str) -> nn.Module:
        """A projection of an expert: nn.Linear, or packed."""
        return self.get_submodule(f"{number}.{projection}")

    @property
    def n_copies(self) -> int:
        """How often each token comes in the tokens that `routed` returns."""
        return 1

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
            fused._parameters[name] = nn.Parameter(
                weight.mT.contiguous() if self.contract.is_transposed else weight
            )
            if self.contract.has_bias:
                bias = torch.stack([layer.bias.detach() for layer in layers])
                fused._parameters[f"{name}_bias"] = nn.Parameter(bias)
        return fused


class SortedExperts(UnfusedExperts):
    """Experts that get (n_experts * n_tokens, in_features): all tokens for the first, all for the second, and so on.

    A token is zero in the stack of an expert that the router does not choose for it, and so is what the expert makes
    of it; it is not computed.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What each expert makes of its stack, as tall as the input.

        Args:
            hidden_states: (n_experts * n_tokens, in_features), multiplied with the routing weights.
        """
        is_chosen = hidden_states.any(dim=-1)
        counts = is_chosen.view(self.n_experts, -1).sum(dim=1).tolist()
        made = torch.zeros_like(hidden_states)
        parts = hidden_states[is_chosen].split(counts)
        if any(counts):
            out = [self.expert(e, part) for e, part in enumerate(parts) if len(part)]
            made[is_chosen] = torch.cat(out).to(made.dtype)
        return made

    @property
    def n_copies(self) -> int:
        """Once per expert."""
        return self.n_experts

    def routed(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as a routing of one expert per row; its weight is in the token already."""
        number = torch.arange(self.n_experts, device=hidden_states.device)
        number = number.repeat_interleave(len(hidden_states) // self.n_experts)
        chosen = torch.where(hidden_states.any(dim=-1), number, -1)
        return hidden_states, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.float32)


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
            kind = SortedExperts if _known_contract(module).is_sorted else UnfusedExperts
            model.set_submodule(path, kind(module))
    return found


def owner(layer: str) -> str | None:
    """Path of the experts that a layer would belong to by its name; None for any other name."""
    *path, number, _ = layer.rsplit(".", 2) if layer.count(".") > 1 else ("", "")
    return path[0] if path and number.isdecimal() else None


def _known_contract(experts: nn.Module) -> Contract:
    contract = contract_of(experts)
    assert contract is not None, type(experts).__name__
    return contract


def _linear(fused: nn.Module, name: str, expert: int) -> nn.Linear:
    """A linear layer of one expert: its weight is a view, its bias a copy."""
    contract, weight = _known_contract(fused), getattr(fused, name)[expert].detach()
    weight = weight.mT if contract.is_transposed else weight
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if contract.has_bias:
        layer.bias = nn.Parameter(
            getattr(fused, f"{name}_bias")[expert].detach().clone(), requires_grad=False
        )
    return layer
