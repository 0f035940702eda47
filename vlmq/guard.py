"""Tensors that stop a load without vlmq: an error in place of random weights.

transformers looks a quantization method up in a table. If `vlmq` was not imported it finds none, warns, builds the
model in full precision, fills each layer whose `weight` the files lack with random numbers, and goes on. What it
does refuse is a tensor of the wrong shape. So each packed layer is stored with one more tensor, which it never has in
memory:

    X.weight       (1, 1, 1) uint8, zero   the weight that a load without vlmq would look for
    E.down_proj    (2, 2, 2) uint8, zero   the same for fused experts, which are stored expert by expert (and for
                                           E.gate_up_proj); transformers may split it as it splits their weights
    NOTE           (1,) uint8, zero        a name that the load report then shows

Three dimensions, because transformers reorders the rows of some weights of one and two dimensions when it saves them
(rotary embeddings of Kimi and Step). With vlmq these are known and dropped without a word. They came with format
version 2.
"""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from safetensors import safe_open
from torch import Tensor

NOTE = "import_vlmq_before_loading_this_checkpoint"
LEAF = "weight"
LAYER_SHAPE = (1, 1, 1)
FUSED_SHAPE = (2, 2, 2)


def guards(layers: Iterable[str], fused: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensors to store beside the packed ones.

    Args:
        layers: names of the packed layers that are not part of experts which transformers fuses.
        fused: names of the parameters that those experts have in transformers.
    """
    shapes = {f"{layer}.{LEAF}": LAYER_SHAPE for layer in layers} | {NOTE: (1,)}
    shapes |= dict.fromkeys(fused, FUSED_SHAPE)
    return {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}


def patterns(layers: Iterable[str], fused: Iterable[str] = ()) -> set[str]:
    """Regular expressions of these tensors, for transformers to drop them."""
    whole = {rf"^{re.escape(name)}$" for name in (*(f"{layer}.{LEAF}" for layer in layers), *fused)}
    return whole | {NOTE}


def find_guards(files: Sequence[str]) -> set[str]:
    """Names on disk of the tensors in these files that have the shape and dtype of a guard, or of a part of one."""
    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith((f".{LEAF}", NOTE))]  # noqa: SIM118
            for name in names:
                part = file.get_slice(name)
                if part.get_dtype() == "U8" and math.prod(part.get_shape()) <= math.prod(FUSED_SHAPE):
                    found.add(name)
    return found
