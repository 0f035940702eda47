"""vLLM against the same values in transformers: packed weights, and log-probabilities, after pictures too.

vLLM fuses layers and names them in its own way; they are found by the end of their path.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmq.eval.export_models import Packed
from vlmq.eval.picture_models import Prompt
from vlmq.eval.vllm_engine import Answer, Request, ask
from vlmq.exports.naming import block_tail
from vlmq.exports.writing import packed_layers

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOWERS = ("vision", "visual")
# vLLM's words for a path of transformers.
WORDS = {"block_sparse_moe": "mlp", ".routed_experts.": "."}


@torch.no_grad()
def compare(
    packed: Packed, rows: Sequence[Tensor], starts: Sequence[int], n_new: int, folder: Path
) -> dict[str, Any]:
    """Let vLLM read a folder.

    Args:
        packed: the model that was exported.
        rows: prompts with the `n_new` tokens that vlmq's kernels chose, each (n_tokens,).
        starts: number of tokens of each prompt.
        n_new: tokens that vLLM adds to each row and each picture.
        folder: the export.

    Raises:
        RuntimeError: vLLM does not read it, or has other packed layers, or other tokens for a picture.
    """
    requests = [Request(tokens=row.tolist()) for row in rows]
    requests += [
        Request(text=f"{p.before}<image>{p.after}", picture=np.asarray(p.picture)) for p in packed.pictures
    ]
    found = ask(folder, requests, n_new)
    plain = copy.deepcopy(packed.model).dequantize()
    largest, n_same = 0.0, 0
    for i, answer in enumerate(found.answers):
        seen = {} if i < len(rows) else _picture(packed.pictures[i - len(rows)], answer)
        start = starts[i] if i < len(rows) else answer.n_prompt
        expected = (
            plain(input_ids=answer.row[None, :-1], **seen).logits[0, start - 1 :].float().log_softmax(-1)
        )
        said = answer.log_probabilities[start - 1 :]
        largest = max(largest, float((said - expected).abs().max()))
        if i < len(rows):
            n_same += int((said[:n_new].argmax(-1) == answer.row[start : start + n_new]).sum())
    return compare_weights(packed, found.weights) | {
        "outputs": largest,
        "n_same": n_same,
        "n_steps": n_new * len(rows),
    }


def _picture(prompt: Prompt, answer: Answer) -> dict[str, Tensor]:
    """What the model takes beside the tokens of a row that begins with a picture."""
    ids = prompt.batch["input_ids"][0].tolist()
    found = answer.row[: answer.n_prompt].tolist()
    if ids != found:
        raise RuntimeError(f"vLLM makes these tokens of a picture with its question: {found}, not {ids}")
    return {n: t for n, t in prompt.batch.items() if n not in ("input_ids", "attention_mask")}


def compare_weights(packed: Packed, found: dict[str, Tensor]) -> dict[str, Any]:
    """Compare in float16, in which vLLM computes."""
    layers = {_key(name): layer for name, layer in packed_layers(packed.model).items()}
    largest, n_layers = 0.0, 0
    for name, weight in found.items():
        is_tower, tail = _key(name)
        parent, _, last = tail.rpartition(".")
        parts = [tail] if (is_tower, tail) in layers else [f"{parent}.{part}" for part in FUSED[last]]
        expected = torch.cat([layers[is_tower, part].dequantize(torch.float16) for part in parts])
        largest = max(largest, float((weight - expected.float()).abs().max()))
        n_layers += len(parts)
    if n_layers != len(layers):
        raise RuntimeError(f"vLLM has {n_layers} packed layers, not {len(layers)}")
    return {"weights": largest, "n_layers": n_layers}


def _key(name: str) -> tuple[bool, str]:
    """Whether a layer is in a tower, and its path from its block on, in transformers' words."""
    tail = block_tail(name)
    for word, ours in WORDS.items():
        tail = tail.replace(word, ours)
    return any(word in name for word in TOWERS), tail
