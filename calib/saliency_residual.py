"""The residual attention module of a block, Attn(X) = X + MHSA(norm(X)), found in any family without its source.

VLMQ's loss compares the residual stream behind the attention. Where a block puts that tensor is found by looking at
the modules that run after the attention: it is the first input h of such a module for which, with the attention's
output o held fixed, dh/dx is the identity, and dh/do is not zero. That is the norm before the MLP, also where the
attention's output is normed or scaled before it is added (Gemma, LayerScale). Without such a tensor the block either
adds attention and MLP in one sum (d output / d o is the identity), then x + o is taken; or the attention stands
outside a residual connection, then the output of the block is taken.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.calib.block import Block, BlockCall, hidden_states
from vlmq.calib.replay import StopForward
from vlmq.calib.saliency_tokens import frozen, hooked
from vlmq.calib.trees import first_tensor, map_leaves
from vlmq.families.packed import is_plain_or_packed


def attention_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost submodules that mix tokens: named or typed "attn" or "attention", with linear layers inside.

    The layers may be packed already.
    """
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        words = f"{name.rpartition('.')[2]} {type(child).__name__}".lower()
        if not name or attention_of(name, found) or isinstance(child, nn.ModuleList | nn.Linear):
            continue
        holds = [(key, m) for key, m in child.named_modules()]
        is_mixer = ("attn" in words or "attention" in words) and not any("mlp" in key for key, _ in holds)
        if is_mixer and any(is_plain_or_packed(m) for _, m in holds):
            found[name] = child
    return found


def attention_of(name: str, attentions: dict[str, nn.Module]) -> str | None:
    """The path of the attention module that the module `name` belongs to."""
    return next((outer for outer in attentions if name.startswith(f"{outer}.")), None)


@dataclass(frozen=True)
class ResidualPoint:
    """Where the residual stream behind an attention module is.

    Attributes:
        entered: the module that it enters; None if it enters none.
        is_sum: without such a module, take block input + attention output; else the block's output.
    """

    entered: str | None
    is_sum: bool = False


@dataclass
class _Probe:
    """One run of a block with the attention's output cut off from the graph."""

    attention_output: Tensor | None = None
    entering: list[tuple[str, Tensor]] = field(default_factory=list)


def find_residual_point(block: Block, attention: str, call: BlockCall) -> ResidualPoint:
    """Find the residual stream behind `attention` by one run of the block on `call`."""
    x, call = _with_leaf(call)
    probe = _Probe()
    outside = {
        name: module
        for name, module in block.original.named_modules()
        if name and name != attention and not name.startswith(f"{attention}.")
    }

    def cut(module: nn.Module, args: tuple, output: Any) -> Any:
        output, probe.attention_output = _cut(output)
        return output

    def enter(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            h = hidden_states(BlockCall(args, kwargs))
            if probe.attention_output is not None and h is not None and h.numel() == x.numel():
                probe.entering.append((name, h.clone()))

        return hook

    handles = [m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in outside.items()]
    handles.append(block.original.get_submodule(attention).register_forward_hook(cut))
    with hooked(*handles), frozen(block.original), torch.enable_grad():
        output = first_tensor(block.run(call, original=True))
        o = probe.attention_output
        rejected: set[str] = set()
        for name, h in probe.entering:
            # `residual_stream` stops at the first entry, so a later one of the same module does not help.
            if name not in rejected and _is_identity(h, x) and _depends(h, o):
                return ResidualPoint(name)
            rejected.add(name)
        is_sum = o is not None and o.numel() == x.numel() == output.numel() and _is_identity(output, o)
    return ResidualPoint(None, is_sum)


def residual_stream(
    block: Block, attention: str, point: ResidualPoint, call: BlockCall, layers: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the full-precision block on `call` up to the residual stream behind the attention.

    Args:
        block: the block.
        attention: path of the attention module.
        point: from `find_residual_point`.
        call: arguments of either path.
        layers: linear layers whose outputs are wanted.

    Returns:
        The residual stream, (rows, n_tokens, features) or (n_tokens, features), and the outputs of `layers`; with
        gradients enabled these are part of its graph.
    """
    outputs: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            outputs[name] = in_graph(output)
            return outputs[name]

        return hook

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A module can be shared with what runs before the attention: only an entry behind it counts.
        h = hidden_states(BlockCall(args, kwargs))
        if has_attended and h is not None:
            seen.append(h)
            raise StopForward

    has_attended: list[Tensor] = []

    def attended(module: nn.Module, args: tuple, output: Any) -> None:
        has_attended.append(first_tensor(output))

    handles = [block.original.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    handles.append(block.original.get_submodule(attention).register_forward_hook(attended))
    if point.entered is not None:
        entered = block.original.get_submodule(point.entered)
        handles.append(entered.register_forward_pre_hook(enter, with_kwargs=True))
    with hooked(*handles):
        try:
            output = first_tensor(block.run(call, original=True))
        except StopForward:
            return seen[0], outputs
    if point.is_sum:
        x = hidden_states(call)
        assert x is not None
        return x.to(output.device).reshape(has_attended[0].shape) + has_attended[0], outputs
    return output, outputs


def in_graph(output: Tensor) -> Tensor:
    """`output`, made the start of a graph where nothing before it needs a gradient; it may be written in place."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    return output.detach().requires_grad_().clone()


def _with_leaf(call: BlockCall) -> tuple[Tensor, BlockCall]:
    """The call with its hidden states replaced by a leaf that takes a gradient."""
    x = hidden_states(call)
    assert x is not None
    leaf = x.detach().clone().requires_grad_()
    args, kwargs = map_leaves(lambda t: leaf if t is x else t, (call.args, call.kwargs))
    return leaf, BlockCall(args, kwargs)


def _cut(output: Any) -> tuple[Any, Tensor]:
    """The output with all tensors detached, the first one as a leaf that takes a gradient; and that leaf."""
    first = first_tensor(output)
    leaf = first.detach().clone().requires_grad_()
    return map_leaves(lambda t: leaf.clone() if t is first else t.detach(), output), leaf


def _direction(like: Tensor) -> Tensor:
    return (
        torch.linspace(1, 9 + like.numel(), like.numel(), device=like.device)
        .cos()
        .to(like.dtype)
        .reshape(like.shape)
    )


def _is_identity(h: Tensor, x: Tensor) -> bool:
    """Whether dh/dx is the identity, tried on one direction."""
    if not h.requires_grad:
        return False
    (slope,) = torch.autograd.grad(h, x, _direction(h), allow_unused=True, retain_graph=True)
    if slope is None:
        return False
    expected = _direction(h).reshape(x.shape).to(x.device)
    return torch.allclose(slope.float(), expected.float(), rtol=1e-3, atol=1e-5)


def _depends(h: Tensor, o: Tensor | None) -> bool:
    """Whether dh/do is not zero, tried on one direction."""
    if o is None:
        return False
    (slope,) = torch.autograd.grad(h, o, _direction(h), allow_unused=True, retain_graph=True)
    return slope is not None and bool((slope != 0).any())
