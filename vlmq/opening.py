"""Open a model or a processor by folder or hub name, packed or not, with the class that fits its config."""

from typing import Any

import torch
import transformers
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel

from vlmq import checkpoint
from vlmq.hf import QUANT_METHOD, VlmqConfig, VlmqQuantizer
from vlmq.imports import METHODS


def open_model(
    path_or_id: str, *, device: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model in eval mode, in the dtype of its checkpoint; a packed one stays packed.

    Checkpoints of compressed-tensors, GPTQ and AWQ are read into packed layers (`vlmq.imports`), as `vlmq.load` does.

    Args:
        path_or_id: folder or repository of the hub.
        device: where to; None is the CPU.
        trust_remote_code: run the model's own code.
    """
    config = checkpoint.open_config(path_or_id, trust_remote_code=trust_remote_code)
    block = getattr(config, "quantization_config", None) or {}
    if block.get("quant_method") in (QUANT_METHOD, *METHODS):
        model = checkpoint.load(path_or_id, trust_remote_code=trust_remote_code)
    else:
        auto = auto_class(config)
        model = auto.from_pretrained(path_or_id, trust_remote_code=trust_remote_code).eval()
    return model if device is None else model.to(device)  # pyright: ignore[reportArgumentType]


def open_empty(path_or_id: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: names, shapes and dtype without weights, from the config alone.

    Layers that the config lists as packed are packed here too.

    Raises:
        ValueError: a checkpoint of another format, whose config does not list its packed layers.
    """
    config = checkpoint.open_config(path_or_id, trust_remote_code=trust_remote_code)
    block = getattr(config, "quantization_config", None) or {}
    if block.get("quant_method") in METHODS:
        raise ValueError(
            f"{path_or_id} is packed already ({block['quant_method']}): quantize the original, or read it by "
            "vlmq.load, write it by vlmq.save and quantize that, which packs the layers that are not packed yet"
        )
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code
        )
    if block.get("quant_method") == QUANT_METHOD:
        VlmqQuantizer(VlmqConfig(**block), pre_quantized=True).preprocess_model(model)
    return model


def open_processor(path_or_id: str, *, trust_remote_code: bool = False) -> Any:
    """Load the model's processor; a tokenizer where the model has nothing else.

    Raises:
        OSError: there is no such model; the message names what was asked for.
    """
    checkpoint.open_config(path_or_id, trust_remote_code=trust_remote_code)
    return AutoProcessor.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)


def check_device(name: str | None) -> None:
    """Check that a device is there; None is the CPU.

    Raises:
        ValueError: an unknown name, or a device that this machine or this torch does not have.
    """
    if name is None:
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"device {name!r} cannot be used ({reason}); take cpu, or one that is there"
        ) from error


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that keeps the most of a model: with its language head, if it has one."""
    kinds = (
        ("AutoModelForImageTextToText", transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    )
    remote = getattr(config, "auto_map", None) or {}
    for name, mapping in kinds:
        if type(config) in mapping or name in remote:
            return getattr(transformers, name)
    return transformers.AutoModel
