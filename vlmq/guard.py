"""Tensors that stop a load without vlmq: an error in place of random weights.

transformers looks a quantization method up in a table. If `vlmq` was not imported it finds none, warns, builds the
model in full precision, fills each layer whose `weight` the files lack with random numbers, and goes on. What it
does refuse is a tensor of the wrong shape. So each packed layer is stored with one more tensor, which it never has in
memory:

    X.weight       (1,) uint8, zero        the weight that a load without vlmq would look for
    NOTE           (1,) uint8, zero        a name that the load report then shows

With vlmq these are known and dropped without a word. They came with format version 2.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from safetensors import safe_open
from torch import Tensor

NOTE = "import_vlmq_before_loading_this_checkpoint"
LEAF = "weight"


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """The tensors to store beside those of the packed layers, by the layers' names."""
    names = [*(f"{layer}.{LEAF}" for layer in layers), NOTE]
    return {name: torch.zeros(1, dtype=torch.uint8) for name in names}


def patterns(layers: Iterable[str]) -> set[str]:
    """Regular expressions of these tensors, for transformers to drop them."""
    return {rf"^{re.escape(layer)}\.{LEAF}$" for layer in layers} | {NOTE}


def find_guards(files: Sequence[str]) -> set[str]:
    """Names on disk of the tensors in these files that have the shape of a guard."""
    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith((f".{LEAF}", NOTE))]  # noqa: SIM118
            found |= {name for name in names if file.get_slice(name).get_shape() == [1]}
    return found
