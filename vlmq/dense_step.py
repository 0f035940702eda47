"""The output head of a packed model where it stays dense: few tokens in C, where torch reads the weights slowly."""

from typing import Any

import torch
from torch import Tensor, nn

from vlmq.kernels.dense import dense, takes
from vlmq.kernels.ops import runs_plainly


def install_dense_step(model: nn.Module) -> None:
    """Let a dense output head compute few tokens in C; all else it does as before."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is nn.Linear and "forward" not in head.__dict__:
        head.forward = DenseStep(head)


class DenseStep:
    """The forward of a dense layer; sums of few tokens in bfloat16 or float16 are made by `vlmq.kernels.dense`."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseStep, (self.layer,)

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features)."""
        layer = self.layer
        parts = layer.weight, layer.bias
        if not torch.compiler.is_compiling() and runs_plainly(input, parts) and takes(input, *parts):
            return dense(input, *parts)
        return nn.Linear.forward(layer, input)
