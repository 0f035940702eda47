"""What the linear layers of a block receive: which of them share an input, and the inputs themselves.

The block is run call by call with hooks on its linear layers. Once the layers that were asked for have been
called, the forward is stopped, so the inputs of q, k and v cost no attention and no MLP.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from vlmq.calib.block import Block, run_call
from vlmq.calib.replay import StopForward

Path = Literal["quantized", "original"]


def calls_in_order(block: Block) -> list[list[str]]:
    """Linear layers of a block in groups that share one input tensor, in the order of their first call.

    In a Llama block: q, k and v; then o; then gate and up; then down. Found on the first call of the block;
    layers that it does not reach (experts in a list) are looked for in the following ones. A layer that no
    call reaches is a group of its own at the end.
    """
    _survey(block)
    linears = block.linears()
    groups = [[name for name in group if name in linears] for group in block.layer_groups]
    return [group for group in groups if group]


def layer_inputs(
    block: Block, names: Collection[str], *, path: Path = "quantized"
) -> Iterator[dict[str, Tensor]]:
    """Per call of the block, the inputs of the named layers.

    Args:
        block: the block as it is now; layers before the named ones may already be quantized.
        names: paths of linear layers in the block.
        path: "quantized" runs the live block on `block.inputs`, "original" the copy on
            `block.original_inputs`.

    Yields:
        name -> (n_tokens, in_features) on the block's device; layers that received the same tensor share one.
        Tokens are in the order of the hidden states, rows after each other, if n_tokens is theirs. A layer
        that received fewer (an expert) or more (padded windows, two calls) has an order of its own, and none
        if it was not called.
    """
    _survey(block)
    for i in range(len(block.inputs)):
        yield _inputs_of_call(block, i, names, original=path == "original")


def _inputs_of_call(
    block: Block, i: int, names: Collection[str], *, original: bool, is_copied: bool = False
) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    flat: list[tuple[Tensor, int, Tensor]] = []

    def see(name: str, tensor: Tensor) -> None:
        known = next((f for t, version, f in flat if _is_same(t, version, tensor)), None)
        if known is None:
            known = tensor.detach().reshape(-1, tensor.shape[-1])
            known = known.clone() if is_copied else known
            flat.append((tensor, tensor._version, known))
        seen[name].append(known)
        if all(len(seen[n]) >= max(1, block.layer_calls.get(n, 1)) for n in names):
            raise StopForward

    module = block.original if original else block.module
    _run_watched(block, i, names, see, original=original)
    if not is_copied and any(t._version != version for t, version, _ in flat):
        # The block wrote into an input after its layer had read it: take it again, as a copy.
        return _inputs_of_call(block, i, names, original=original, is_copied=True)
    return {name: _joined(parts, module.get_submodule(name), block.device) for name, parts in seen.items()}


def _joined(parts: list[Tensor], layer: nn.Module, device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, int(layer.in_features), device=device)  # type: ignore[arg-type]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _survey(block: Block) -> None:
    """Find, once per block, the layers that share an input and how often a forward calls each layer."""
    if block.layer_groups:
        return
    names = list(block.linears())
    missing = set(names)
    counts: Counter[str] = Counter(dict.fromkeys(names, 0))
    for i in range(len(block.inputs)):
        seen: list[tuple[Tensor, int, list[str]]] = []

        def see(name: str, tensor: Tensor, seen=seen, is_first=i == 0) -> None:
            counts[name] += is_first
            if name not in missing:
                return
            missing.discard(name)
            group = next((g for t, version, g in seen if _is_same(t, version, tensor)), None)
            if group is None:
                seen.append((tensor, tensor._version, [name]))
            else:
                group.append(name)

        _run_watched(block, i, names, see, original=False)
        block.layer_groups += [group for _, _, group in seen]
        if not missing:
            break
    block.layer_groups += [[name] for name in names if name in missing]
    block.layer_calls.update(counts)


def _run_watched(
    block: Block, i: int, names: Collection[str], see: Callable[[str, Tensor], None], *, original: bool
) -> None:
    """Run a block, call `see(name, input)` before each call of the named layers; `StopForward` ends it."""
    module, calls = (block.original, block.original_inputs) if original else (block.module, block.inputs)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(name, args[0] if args else kwargs["input"])

    handles = [module.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad(), block.replaying(i, original=original, reach=names):
            run_call(module, calls[i], block.device)
    except StopForward:
        return
    finally:
        for handle in handles:
            handle.remove()


def _is_same(known: Tensor, version: int, tensor: Tensor) -> bool:
    """Whether `tensor` is the memory of `known`, seen in the same way and not written since `version`."""
    return (
        known.data_ptr() == tensor.data_ptr()
        and known.shape == tensor.shape
        and known.stride() == tensor.stride()
        and version == tensor._version
    )
