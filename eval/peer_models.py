"""Whole models as other packages run them, for `vlmq.eval.bench_models`: `bitsandbytes:MODEL`, `gptqmodel:MODEL`.

bitsandbytes rounds the linear layers of an original to nf4 in blocks of 64 as transformers loads it; GPTQModel reads a
GPTQ checkpoint, such as `vlmq export --to gptq` writes, and chooses its kernels.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq import checkpoint
from vlmq.eval.peers import PEERS, why_not
from vlmq.opening import auto_class

NAMES = {"bitsandbytes": "bitsandbytes", "gptqmodel": "GPTQModel"}
"""{prefix of a model: package}."""


def split_peer(model: str) -> tuple[str | None, str]:
    """Package and model of `bitsandbytes:MODEL`; (None, model) for other models.

    Raises:
        ValueError: the package is not installed.
    """
    prefix, colon, path = model.partition(":")
    if not colon or prefix not in NAMES:
        return None, model
    reason = why_not(NAMES[prefix])
    if reason is not None:
        raise ValueError(f"model {model!r} needs the package {PEERS[NAMES[prefix]].install}, {reason}")
    return NAMES[prefix], path


def open_peer(peer: str, path: str, device: str) -> PreTrainedModel:
    """Load a model in bfloat16 with a package of `NAMES`."""
    if peer == "GPTQModel":
        from gptqmodel import GPTQModel  # pyright: ignore[reportMissingImports]

        return GPTQModel.load(path, device=device, dtype=torch.bfloat16).model.eval()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    auto = auto_class(checkpoint.open_config(path, trust_remote_code=False))
    return auto.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map=device
    ).eval()


def peer_bits(model: nn.Module) -> tuple[float, float]:
    """True bits per weight of the layers that a package has packed, and bytes of all weights; for after a run."""
    n_weights = n_bytes = 0
    seen: dict[int, int] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        parts: list[Any] = list(own)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            parts += [state.absmax, state.code]
        elif hasattr(module, "qweight"):
            parts = [module.qweight, module.qzeros, module.scales]
        seen.update({id(part): part.nbytes for part in parts})
        if state is not None or hasattr(module, "qweight"):
            n_weights += int(module.in_features) * int(module.out_features)  # pyright: ignore
            n_bytes += sum(part.nbytes for part in parts)
    return 8 * n_bytes / n_weights, sum(seen.values())
