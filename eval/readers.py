"""What a reader of another project makes of an export, against the same values in transformers.

Each function here takes a packed model, what it says after some prompts (`follow`) and the folder that was exported,
and returns the largest differences; `vlmq.eval.export_readers` tells what they mean.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.eval import onnx_reader, vllm_reader
from vlmq.eval.export_models import Packed
from vlmq.eval.foreign_packers import read_back
from vlmq.eval.llama_cpp import LlamaCpp
from vlmq.exports.gguf_layout import text_part
from vlmq.exports.writing import packed_layers
from vlmq.linear import QuantLinear
from vlmq.opening import auto_class

N_NEW = 16
N_BEST = 100


@dataclass(frozen=True)
class Steps:
    """What vlmq says after each prompt and each token that follows.

    Attributes:
        rows: prompts with the tokens that vlmq's kernels chose, each (n_tokens,).
        starts: number of tokens of each prompt.
        log_probabilities: of the dequantized model after each of those tokens, each (N_NEW, n_words).
        own: largest difference of vlmq's kernels from that, over the `N_BEST` likeliest tokens.
    """

    rows: list[Tensor]
    starts: list[int]
    log_probabilities: list[Tensor]
    own: float


Reading = dict[str, Any]
Read = Callable[[Packed, Steps, Path], Reading]


@torch.no_grad()
def follow(packed: Packed) -> Steps:
    """Generate greedily with vlmq's kernels, also after an end, and take what the dequantized model says of it."""
    plain = copy.deepcopy(packed.model).dequantize()
    rows, starts, expected, own = [], [], [], 0.0
    for prompt in packed.prompts:
        row, cache, new, found = prompt, None, prompt, []
        for _ in range(N_NEW):
            out = packed.model(input_ids=new, past_key_values=cache, use_cache=True)
            found.append(out.logits[0, -1].float().log_softmax(-1))
            new, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            row = torch.cat([row, new], dim=1)
        rows.append(row[0])
        starts.append(prompt.shape[1])
        expected.append(_log_probabilities(plain, row[0], prompt.shape[1]))
        best = expected[-1].topk(N_BEST).indices
        difference = torch.stack(found).gather(1, best) - expected[-1].gather(1, best)
        own = max(own, float(difference.abs().max()))
    return Steps(rows, starts, expected, own)


def _log_probabilities(model: PreTrainedModel, row: Tensor, start: int) -> Tensor:
    return _after(model(input_ids=row[None, :-1]).logits[0], start)


def _after(logits: Tensor, start: int) -> Tensor:
    """Log-probabilities after the last token of the prompt and after each that follows, of logits of a whole row."""
    return logits[start - 1 :].float().log_softmax(-1)


@torch.no_grad()
def compare_outputs(model: PreTrainedModel, steps: Steps) -> Reading:
    """The outputs of a model of transformers against those of vlmq."""
    return compare_logits(lambda row: model(input_ids=row[None]).logits[0], steps)


def compare_logits(logits_of: Callable[[Tensor], Tensor], steps: Steps) -> Reading:
    """The same, of a function that gives the logits of a row."""
    largest, n_same = 0.0, 0
    for row, start, expected in zip(steps.rows, steps.starts, steps.log_probabilities, strict=True):
        found = _after(logits_of(row[:-1]), start)
        largest = max(largest, float((found - expected).abs().max()))
        n_same += int((found.argmax(-1) == row[start:]).sum())
    return {"outputs": largest, "n_same": n_same, "n_steps": N_NEW * len(steps.rows)}


@torch.no_grad()
def compare_weights(
    packed: Packed, weight_of: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
) -> Reading:
    """The weights of a reader, by the name of the layer, against those of vlmq in the dtype that it computes in."""
    layers = packed_layers(packed.model)
    largest = max(
        float((weight_of(n).float() - layer.dequantize(dtype).float()).abs().max())
        for n, layer in layers.items()
    )
    return {"weights": largest, "n_layers": len(layers)}


def read_transformers(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """transformers with the quantizer that config.json names."""
    auto = auto_class(packed.model.config)
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.hf_quantizer is not None
    outputs = compare_outputs(model, steps)

    def weight_of(name: str) -> Tensor:
        layer = model.get_submodule(name)
        unpack = getattr(layer, "_dequantize_weights", None)
        return layer.weight if unpack is None else unpack(torch.float32)

    return compare_weights(packed, weight_of) | outputs


def read_gguf(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """The package gguf, which unpacks the blocks in numpy."""
    from gguf import GGUFReader, quants

    found = {
        t.name: torch.tensor(quants.dequantize(t.data, t.tensor_type))
        for t in GGUFReader(folder / "model.gguf").tensors
    }
    part = text_part(packed.model)
    largest, n_layers = 0.0, 0
    for _, module, name in part.modules():
        if isinstance(module, QuantLinear):
            expected = part.reorder(name, module.dequantize())
            largest = max(largest, float((found[f"{name}.weight"] - expected).abs().max()))
            n_layers += 1
    return {"weights": largest, "n_layers": n_layers}


def read_gguf_transformers(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """transformers, which unpacks a GGUF file as it loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    return compare_weights(packed, lambda name: model.get_submodule(name).weight) | compare_outputs(
        model, steps
    )


def read_llama_cpp(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """llama.cpp, which rounds the inputs of packed layers to 8 bits."""
    engine = LlamaCpp(folder / "model.gguf")
    largest, n_same = 0.0, 0
    for row, start, expected in zip(steps.rows, steps.starts, steps.log_probabilities, strict=True):
        for step in range(N_NEW):
            ids, found = engine.next_tokens(row[: start + step].tolist(), N_BEST)
            largest = max(largest, float((found - expected[step, ids]).abs().max()))
            n_same += int(ids[0] == row[start + step])
    del engine
    gc.collect()
    return {"outputs": largest, "n_same": n_same, "n_steps": N_NEW * len(steps.rows)}


@torch.no_grad()
def read_pictures(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """llama.cpp on both files, asked for the first token after a picture."""
    engine = LlamaCpp(folder / "model.gguf", 512, folder / "mmproj-model.gguf")
    plain = copy.deepcopy(packed.model).dequantize()
    largest, own, n_same = 0.0, 0.0, 0
    for prompt in packed.pictures:
        ids, found, n_tokens = engine.after_picture(prompt.before, prompt.picture, prompt.after, N_BEST)
        if n_tokens != (n_ours := prompt.batch["input_ids"].shape[1]):
            raise RuntimeError(f"llama.cpp makes {n_tokens} tokens of a prompt with a picture, vlmq {n_ours}")
        expected = plain(**prompt.batch).logits[0, -1].log_softmax(-1)
        kernels = packed.model(**prompt.batch).logits[0, -1].log_softmax(-1)
        largest = max(largest, float((found - expected[ids]).abs().max()))
        own = max(own, float((kernels - expected)[ids].abs().max()))
        n_same += int(ids[0] == kernels.argmax())
    del engine
    gc.collect()
    return {"outputs": largest, "own": own, "n_same": n_same, "n_steps": len(packed.pictures)}


def read_gptqmodel(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """GPTQModel's layers in PyTorch, on the CPU, in float16."""
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]

    wrapper = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    model = wrapper.model

    def weight_of(name: str) -> Tensor:
        return model.get_submodule(name).dequantize_weight().T

    return compare_weights(packed, weight_of, torch.float16) | compare_outputs(model, steps)


def read_vllm(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """vLLM on the CPU in float16, which also adds tokens of its own, and to questions about pictures."""
    return vllm_reader.compare(packed, steps.rows, steps.starts, N_NEW, folder)


def read_onnx(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """ONNX Runtime, on what the builder of ONNX Runtime GenAI makes of a GPTQ folder."""
    out = folder.with_name("onnx")
    onnx_reader.build(folder, out)
    model = onnx_reader.OnnxModel(out)
    found = model.weights()

    def weight_of(name: str) -> Tensor:
        parent, _, last = name.rpartition(".")
        block, _, half = parent.rpartition(".")
        node = f"/{block.replace('.', '/', 1)}/{half.removeprefix('self_')}"
        if last not in ("q_proj", "k_proj", "v_proj"):
            return found[f"{node}/{last}/MatMulNBits"]
        parts = [packed.model.get_submodule(f"{parent}.{kind}_proj") for kind in "qkv"]
        sizes = [int(part.out_features) for part in parts]  # pyright: ignore[reportArgumentType]
        return found[f"{node}/qkv_proj/MatMulNBits"].split(sizes)["qkv".index(last[0])]

    return compare_weights(packed, weight_of) | compare_logits(model.logits, steps)


def read_imports(packed: Packed, steps: Steps, folder: Path) -> Reading:
    """The other way round: vlmq reads layers that GPTQModel's packers for GPTQ and AWQ wrote."""
    largest = [read_back(layer.quantized_weight()) for layer in packed_layers(packed.model).values()]
    return {"weights": max(largest), "n_layers": len(largest)}
