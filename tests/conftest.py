"""What every test stands on: a fixed seed, and memory from `torch.empty` that is not zero by luck."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

# Tiny tensors gain nothing from threads, and a barrier of threads waits long where the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; the GPU only where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


# torch.device as a context looks functions up in this table; it must hold the true torch.empty, not a poisoned one.
_device_constructors()


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poison(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return allocate_poison


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh uninitialised memory with NaN: a value that is read before it was written shows up."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
