"""What runs in the process that has the other device."""

import contextlib
from collections.abc import Callable

import tiny_models
import torch
from other_device import other_device
from torch import Tensor

import vlmq
from vlmq.families import describe
from vlmq.families.experts import is_fused
from vlmq.progress import SilentProgress

torch.set_num_threads(1)


def refused() -> list[str]:
    """Which mixtures of devices are refused."""
    with other_device() as device:
        there, here = torch.ones(3, 4, device=device), torch.ones(3, 4)
        mixtures: dict[str, Callable[[], object]] = {
            "sum": lambda: there + here,
            "join": lambda: torch.cat([there, here]),
            "numpy": lambda: there.numpy(),
            "generator": lambda: torch.rand(2, generator=torch.Generator(), device=device),
        }
        return [name for name, mix in mixtures.items() if _is_refused(mix)]


def quantized_places(family: str, home: str, place: str, scheme: str, solver: str | None) -> set[str]:
    """Devices of the parameters of a model that lay on `home` and was quantized on `place`; its forward runs."""
    with other_device():
        model = tiny_models.build(family).to(f"{home}:0" if home == "other" else home)
        batches = tiny_models.inputs(family, 2)
        vlmq.quantize(model, batches, scheme, solver=solver, device=torch.device(place, 0))
        with torch.no_grad():
            model(**{key: _to(home, value) for key, value in batches[0].items()})
        return {parameter.device.type for parameter in model.parameters()}


def _to(home: str, tensor: Tensor) -> Tensor:
    return tensor.to(torch.device("other", 0)) if home == "other" else tensor


def _is_refused(mix: Callable[[], object]) -> bool:
    try:
        mix()
    except (RuntimeError, TypeError):
        return True
    return False


class _Stops(SilentProgress):
    def layer(self, *_: object) -> None:
        raise KeyboardInterrupt


def places_after_a_stop() -> set[str]:
    """Devices of the parameters of a model on the CPU whose first block was stopped on the other device."""
    with other_device() as device:
        model = tiny_models.build("llama")
        with contextlib.suppress(KeyboardInterrupt):
            vlmq.quantize(model, tiny_models.inputs("llama", 2), "int4-g16", device=device, progress=_Stops())
        return {parameter.device.type for parameter in model.parameters()}


class _Looks(SilentProgress):
    """Stops at the first layer of the last block, and has looked where the originals of the blocks are then."""

    def __init__(self, blocks: list[torch.nn.Module]) -> None:
        self.layers = [[m for m in block.modules() if _has_weight(m)] for block in blocks]
        self.seen: set[str] = set()

    def layer(self, _: object, block_name: str) -> None:
        self.seen.add(block_name)
        if len(self.seen) == len(self.layers):
            self.places = [
                {p.device.type for m in ms for p in m.parameters(recurse=False)} for ms in self.layers
            ]
            raise KeyboardInterrupt


def _has_weight(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or is_fused(module)


def places_of_originals(family: str) -> tuple[set[str], set[str], set[str], bool]:
    """Devices of originals of the first and of the last block, then of all parameters; whether these are as before."""
    with other_device() as device:
        model = tiny_models.build(family)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.to(device)
        overrides = {"vision": None} if family != "llama" else None
        language = [block for block in describe(model).blocks if block.part in ("language", "text")]
        progress = _Looks([model.get_submodule(block.name) for block in language])
        with contextlib.suppress(KeyboardInterrupt):
            batches = tiny_models.inputs(family, 2)
            vlmq.quantize(model, batches, "int4-g16", overrides=overrides, progress=progress)
        after = dict(model.named_parameters())
        is_same = after.keys() == before.keys() and all(
            torch.equal(p.cpu(), before[n]) for n, p in after.items()
        )
        places = {p.device.type for p in after.values()}
        return progress.places[0], progress.places[-1], places, is_same
