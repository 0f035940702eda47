"""The model's own forward, run again for each block, with what is finished replaced by what it returned.

Handing the output of block k to block k + 1 is wrong for models that mix features in between (deepstack), so
the model itself is run: a finished block is a stub that returns its stored output, the block of interest
takes its real arguments, and the forward stops there by an exception. Only what lies between the blocks is
computed again.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.calib.block import BlockCall
from vlmq.calib.forwards import patched, repeat_writes, run_with_writes
from vlmq.calib.tokens import CalibBatch
from vlmq.calib.trees import Dropped, leaves, load, map_leaves, offload

Outputs = dict[int, list[Any]]


class StopForward(Exception):  # noqa: N818
    """Ends a forward once everything that was wanted from it is there."""


@contextmanager
def calibration_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no key-value cache, until the end; then everything as it was."""
    was_training = model.training
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}
    caches = [(config, config.use_cache) for config in configs.values()]
    try:
        model.eval()
        for config, _ in caches:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in caches:
            config.use_cache = use_cache
        for module in model.modules():
            module.training = training.get(module, was_training)


def _configs(config: Any) -> Iterator[Any]:
    """The config of a module and the configs inside it, as far as they have a `use_cache`."""
    if "use_cache" in getattr(config, "__dict__", ()):
        yield config
    for name in getattr(config, "sub_configs", ()):
        yield from _configs(getattr(config, name, None))


class Replay:
    """Runs batches through a model in which some modules are stubs.

    Outputs, with what was written to dicts among the arguments, are kept in CPU memory, per path ("original",
    "quantized"), module and batch one tree per call. On the model's device lie, at the peak, the model, one
    batch and what the module that runs needs.
    """

    def __init__(self, model: PreTrainedModel, batches: list[CalibBatch]) -> None:
        self.model = model
        self.batches = batches
        self.home = next(model.parameters()).device
        self.outputs: dict[str, dict[str, Outputs]] = {"original": {}, "quantized": {}}
        self._accepts_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._blanks: dict[Dropped, Tensor] = {}

    def forward(self, index: int) -> None:
        """Run the model on one batch; a `StopForward` ends it early."""
        inputs = load(dict(self.batches[index].inputs), self.home)
        if self._accepts_use_cache:
            inputs["use_cache"] = False
        try:
            self.model(**inputs)
        except StopForward:
            return

    def capture(self, name: str, index: int, n_calls: int, path: str) -> tuple[list[BlockCall], list[Any]]:
        """The calls of a module in one batch, and its outputs if it was run.

        A module that is called once is not run. One that is called several times is, because its later inputs
        may depend on its earlier outputs.
        """
        module = self.model.get_submodule(name)
        live = module.forward
        calls: list[BlockCall] = []
        outputs: list[Any] = []

        def take(*args: Any, **kwargs: Any) -> Any:
            calls.append(BlockCall(*offload((args, kwargs))))
            if n_calls == 1:
                raise StopForward
            made = run_with_writes(live, args, kwargs)
            outputs.append(offload(made))
            if len(outputs) == n_calls:
                raise StopForward
            return made[0]

        self._run(index, path, {module: take})
        return calls, outputs

    def record(self, name: str, index: int, n_calls: int, path: str) -> list[Any]:
        """What a module returns in each of its calls in one batch."""
        module = self.model.get_submodule(name)
        live = module.forward
        outputs: list[Any] = []

        def listen(*args: Any, **kwargs: Any) -> Any:
            made = run_with_writes(live, args, kwargs)
            outputs.append(offload(made))
            if len(outputs) == n_calls:
                raise StopForward
            return made[0]

        self._run(index, path, {module: listen})
        return outputs

    def stored(self, path: str, index: int) -> Iterator[Tensor]:
        """The tensors that are stored of one batch."""
        for outputs in self.outputs[path].values():
            yield from (leaf for leaf in leaves(outputs.get(index, [])) if isinstance(leaf, Tensor))

    def keep(self, name: str, numbers: set[int]) -> None:
        """Of the stored outputs of a module keep the tensors of those numbers; forget the others."""
        for stored in {id(s[name]): s[name] for s in self.outputs.values() if name in s}.values():
            for trees in stored.values():
                trees[:] = [_only(tree, numbers) for tree in trees]

    def forget(self, names: list[str]) -> None:
        """Forget modules: they run again when the model calls them."""
        for stored in self.outputs.values():
            for name in names:
                stored.pop(name, None)

    def _run(self, index: int, path: str, forwards: dict[nn.Module, Callable[..., Any]]) -> None:
        stubs = {
            self.model.get_submodule(name): self._stub(name, index, stored.get(index, []))
            for name, stored in self.outputs[path].items()
        }
        with patched(stubs | forwards), torch.no_grad():
            self.forward(index)

    def _stub(self, name: str, index: int, trees: list[Any]) -> Callable[..., Any]:
        remaining = iter(trees)

        def stub(*args: Any, **kwargs: Any) -> Any:
            for tree in remaining:
                output, written = map_leaves(self._revive, tree)
                repeat_writes(written, args, kwargs)
                return output
            raise RuntimeError(
                f"{name!r} in batch {index}: expected {len(trees)} calls as in the first batch with the same "
                "inputs, got more; give batches that run other modules other input names, or take them out"
            )

        return stub

    def _revive(self, leaf: Tensor | Dropped) -> Tensor:
        """A stored tensor on the device; NaN for a dropped one, so that an unknown reader of it shows up."""
        if isinstance(leaf, Tensor):
            return leaf.to(self.home, copy=True)
        blank = self._blanks.get(leaf)
        if blank is None or blank._version > 0:
            blank = torch.full(leaf.shape, torch.nan, dtype=leaf.dtype, device=self.home)
            self._blanks[leaf] = blank
        return blank


def _only(tree: Any, numbers: set[int]) -> Any:
    is_kept = iter([number in numbers for number, _ in enumerate(leaves(tree))])

    def keep(leaf: Tensor | Dropped) -> Tensor | Dropped:
        if next(is_kept) or isinstance(leaf, Dropped) or not leaf.is_floating_point():
            return leaf
        return Dropped(leaf.shape, leaf.dtype)

    return map_leaves(keep, tree)
