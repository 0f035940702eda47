"""What runs in the process that has the other device."""

import contextlib
from collections.abc import Callable

import tiny_models
import torch
from other_device import other_device
from torch import Tensor

import vlmq
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
