"""What a model weighs: true bits per weight, in memory and on disk, parameters, bytes.

Bits count everything that is stored for the quantized layers: codes with their padding, scales, zero points.
Biases and all other parameters count in full in the figures for the whole model, a tied parameter once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlmq.linear import QuantLinear, true_bits
from vlmq.stored import disk_bits


@dataclass(frozen=True)
class ModelSize:
    """Size of a model, or of one part of it.

    `n_quantized_weights` weights in `n_quantized_layers` layers are `quantized_bits` bits in
    memory and `disk_bits` in a checkpoint, where ternary codes are stored in fewer; `n_parameters` is the number of
    parameters before quantization, which take `total_bits` bits of memory now.
    """

    n_quantized_layers: int
    n_quantized_weights: int
    quantized_bits: int
    disk_bits: int
    n_parameters: int
    total_bits: int

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight, in memory; NaN where nothing is quantized."""
        return self.quantized_bits / self.n_quantized_weights if self.n_quantized_weights else float("nan")

    @property
    def disk_bits_per_weight(self) -> float:
        """True bits per quantized weight, in a checkpoint; NaN where nothing is quantized."""
        return self.disk_bits / self.n_quantized_weights if self.n_quantized_weights else float("nan")

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of everything, quantized or not, in memory."""
        return self.total_bits / self.n_parameters if self.n_parameters else float("nan")

    @property
    def coverage(self) -> float:
        """Share of the parameters that are quantized."""
        return self.n_quantized_weights / self.n_parameters if self.n_parameters else float("nan")


def model_size(model: nn.Module) -> ModelSize:
    """Count the parameters of a module and the bits that they take."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    packed = {id(p) for layer in layers for p in (layer.qweight, layer.scales, layer.zeros) if p is not None}
    rest = [p for p in model.parameters() if id(p) not in packed]
    n_weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(true_bits(layer) for layer in layers)
    return ModelSize(
        n_quantized_layers=len(layers),
        n_quantized_weights=n_weights,
        quantized_bits=bits,
        disk_bits=sum(disk_bits(layer) for layer in layers),
        n_parameters=n_weights + sum(p.numel() for p in rest),
        total_bits=bits + sum(8 * p.numel() * p.element_size() for p in rest),
    )


def sparsity(layers: Iterable[QuantLinear]) -> float:
    """Share of the weights that are exactly 0, over all layers; NaN without any.

    Args:
        layers: packed layers.
    """
    n_zeros = n_weights = 0
    for layer in layers:
        weight = layer.dequantize()
        n_zeros += int((weight == 0).sum())
        n_weights += weight.numel()
    return n_zeros / n_weights if n_weights else float("nan")


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a checkpoint's folder.

    Raises:
        ValueError: there is no weight file in it.
    """
    files = [p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    if not files:
        raise ValueError(
            f"folder {str(folder)!r} holds no weight file: expected *.safetensors of a saved model"
        )
    return sum(p.stat().st_size for p in files)
