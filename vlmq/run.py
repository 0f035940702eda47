"""The state of one call of `quantize`: what has been taken out of the model, and what takes its place.

What was taken out is kept until the end, as the very modules that were in the model, since a failure puts them back.
That of finished blocks waits in CPU memory, so that on a GPU only one block is there in full precision and packed.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.families.experts import unfuse
from vlmq.formats import QuantizedWeight
from vlmq.heap import trim_heap
from vlmq.linear import QuantLinear
from vlmq.planning import Plan
from vlmq.progress import Progress
from vlmq.report import LayerReport

WAITING = torch.device("cpu")


@dataclass
class Run:
    """One call of quantize: what was taken out of the model, layers and fused experts, and the packed layers."""

    model: PreTrainedModel
    plan: Plan
    alpha: float
    seed: int
    progress: Progress
    originals: dict[str, nn.Linear] = field(default_factory=dict)
    packed: dict[str, QuantLinear] = field(default_factory=dict)
    fused: dict[str, nn.Module] = field(default_factory=dict)
    home: torch.device = field(init=False)

    def __post_init__(self) -> None:
        # Blocks may be computed elsewhere; layers that are out of the model then do not come back with them.
        self.home = next(self.model.parameters()).device

    def unfuse(self) -> None:
        """Take apart the experts that the plan quantizes."""
        self.fused = unfuse(self.model, list(self.plan.in_blocks()))

    def blocks(self) -> set[str]:
        """Blocks that hold at least one layer of the plan."""
        infos = (self.plan.layout.linears[name] for name in self.plan.in_blocks())
        return {info.block for info in infos if info.block is not None}

    def replace(self, name: str, quantized: QuantizedWeight, report: LayerReport) -> None:
        """Put a layer with the quantized values in place for the rest of the walk, and keep the packed one."""
        original = self.model.get_submodule(name)
        assert isinstance(original, nn.Linear)
        self.originals[name] = original
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.in_features, dense.out_features = original.in_features, original.out_features
        weight = quantized.dequantize(original.weight.dtype).to(original.weight.device)
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), original.bias
        self.model.set_submodule(name, dense)
        packed = QuantLinear.from_quantized(quantized, original.bias, dtype=original.weight.dtype)
        packed.to(original.weight.device)
        packed.report = report
        self.packed[name] = packed

    def requantize(self, name: str, quantized: QuantizedWeight) -> None:
        """Give a layer that has been replaced other quantized values; its report stays."""
        dense, before = self.model.get_submodule(name), self.packed[name]
        assert isinstance(dense, nn.Linear)
        dense.weight.data = quantized.dequantize(dense.weight.dtype).to(dense.weight.device)
        packed = QuantLinear.from_quantized(quantized, dense.bias, dtype=dense.weight.dtype)
        packed.to(dense.weight.device)
        packed.report = before.report
        self.packed[name] = packed

    def pack(self, prefix: str = "") -> None:
        """Put the packed layers under `prefix` in place of their dense stand-ins, all where the model is.

        What was taken out waits in CPU memory from then on, and freed memory goes back to the system.
        """
        for path, experts in self.fused.items():
            if path.startswith(prefix):
                # Their layers are views of them, and come back with them.
                for name in [name for name in self.originals if name.startswith(f"{path}.")]:
                    del self.originals[name]
                experts._apply(lambda tensor: tensor.to(WAITING), recurse=False)
        for name, layer in self.packed.items():
            if name.startswith(prefix):
                self.model.set_submodule(name, layer.to(self.home))
                if name in self.originals:
                    self.originals[name].to(WAITING)
        trim_heap()

    def restore(self) -> None:
        """Put the full-precision layers back, and all of their blocks to where the model is."""
        self.packed.clear()
        for name, layer in (*self.originals.items(), *self.fused.items()):
            self.model.set_submodule(name, layer.to(self.home))
        for block in map(self.model.get_submodule, self.blocks()):
            if not any(parameter.is_meta for parameter in block.parameters()):
                block.to(self.home)
