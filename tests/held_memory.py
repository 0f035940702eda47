"""How many bytes of tensors are there at a time while something runs, counted operator by operator."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Counts the storages that operators have made and that a tensor still holds; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
                self._see(tensor, tensor.data_ptr() in inputs)
        return made

    def _see(self, tensor: Tensor, is_input: bool) -> None:
        storage = tensor.untyped_storage()
        place, n_bytes = storage.data_ptr(), storage.nbytes()
        if place not in self._holders and (is_input or tensor._is_view()):
            return  # of somebody else
        if place not in self._holders:
            self._holders[place] = 0
            self.held += n_bytes
            self.peak = max(self.peak, self.held)
        self._holders[place] += 1
        weakref.finalize(tensor, self._leave, place, n_bytes)

    def _leave(self, place: int, n_bytes: int) -> None:
        self._holders[place] -= 1
        if self._holders[place] == 0:
            del self._holders[place]
            self.held -= n_bytes
