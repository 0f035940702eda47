"""Low-bit quantization of vision-language models, weighted by token saliency.

    model = vlmq.quantize(model, calib_data, "int2-g64")
    model.save_pretrained("out")

Importing vlmq makes packed checkpoints known to transformers, so that its own `from_pretrained` loads them.
"""

from vlmq import calib, eval
from vlmq.checkpoint import load, save
from vlmq.distillation import distill
from vlmq.hub import push
from vlmq.planning import plan
from vlmq.quantization import quantize

__all__ = [
    "calib",
    "distill",
    "eval",
    "load",
    "plan",
    "push",
    "quantize",
    "save",
]
