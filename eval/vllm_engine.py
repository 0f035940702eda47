"""vLLM in a process of its own: what it says of prompts, and the weights that it computes with.

    found = ask(folder, [Request(tokens=[5, 9, 100])], n_new=16)

The process runs vLLM's engine in itself, so that the model can be reached, without compilation. A packed layer's
weights are what it makes of the identity, as kernels keep them in orders of their own:

    W = (layer(I))^T

Log-probabilities are those of all words, so this is for small vocabularies.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmq.eval import vllm_experts

SETTINGS = ("VLLM_ENABLE_V1_MULTIPROCESSING=0", "VLLM_NO_USAGE_STATS=1", "HF_HUB_OFFLINE=1")
CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Request:
    """A prompt: tokens, or text with a picture.

    Attributes:
        tokens: of a text prompt.
        text: of a prompt with a picture, with one placeholder.
        picture: (height, width, 3) uint8.
    """

    tokens: list[int] | None = None
    text: str | None = None
    picture: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """What vLLM says.

    Attributes:
        row: the prompt as the model saw it, and the new tokens, (n_tokens,).
        n_prompt: tokens of the prompt.
        log_probabilities: after each token of the row but the last, (n_tokens - 1, n_words).
    """

    row: Tensor
    n_prompt: int
    log_probabilities: Tensor


@dataclass(frozen=True)
class Found:
    """What the process found.

    Attributes:
        answers: one for each request.
        weights: {vLLM's name of a packed layer: (out_features, in_features)}; layers that it fuses are one.
    """

    answers: list[Answer]
    weights: dict[str, Tensor]


def ask(folder: Path, requests: Sequence[Request], n_new: int, dtype: str = "float16") -> Found:
    """Let vLLM load a folder and answer greedily.

    Args:
        folder: a model with its tokenizer, and its processor for pictures.
        requests: the prompts.
        n_new: tokens to add to each, also after an end.
        dtype: what vLLM computes in.

    Raises:
        RuntimeError: vLLM does not load or run the model; the message is the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="vlmq-vllm-") as work:
        job = Path(work, "job.pt")
        torch.save((str(folder), list(requests), n_new, dtype), job)
        command = ["env", *SETTINGS, sys.executable, "-m", "vlmq.eval.vllm_engine", str(job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        answer = job.with_name("found.pt")
        if done.returncode or not answer.exists():
            raise RuntimeError(f"vLLM on {folder}: exit code {done.returncode}\n{done.stdout[-4000:]}")
        return torch.load(answer, weights_only=False)


def _answer(folder: str, requests: Sequence[Request], n_new: int, dtype: str) -> Found:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    vllm_experts.replace_kernel()
    engine = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_num_seqs=4,
        max_logprobs=-1,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
        seed=0,
    )
    asked = SamplingParams(
        temperature=0, max_tokens=n_new, ignore_eos=True, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    outputs = engine.generate([_prompt(request) for request in requests], asked, use_tqdm=False)
    weights = engine.apply_model(_weights)[0]
    return Found([_collect(output) for output in outputs], weights)


def _prompt(request: Request) -> dict[str, Any]:
    if request.picture is None:
        return {"prompt_token_ids": request.tokens}
    from PIL import Image

    return {"prompt": request.text, "multi_modal_data": {"image": Image.fromarray(request.picture)}}


def _collect(output: Any) -> Answer:
    new = output.outputs[0]
    steps = [*output.prompt_logprobs[1:], *new.logprobs]
    n_words = max(len(step) for step in steps)
    found = [[step[word].logprob for word in range(n_words)] for step in steps]
    row = torch.tensor([*output.prompt_token_ids, *new.token_ids])
    return Answer(row, len(output.prompt_token_ids), torch.tensor(found))


@torch.no_grad()
def _weights(model: Any) -> dict[str, Tensor]:
    """What packed linear layers make of the identity."""
    weights = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or not hasattr(module, "input_size_per_partition"):
            continue
        if type(method).__name__ in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
            continue
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        eye = torch.eye(module.input_size_per_partition, dtype=dtype)
        weights[name] = method.apply(module, eye, None).T.float().contiguous()
    for name, module in model.named_modules():
        for part, stack in zip(("gate_up_proj", "down_proj"), getattr(module, "dense", ()), strict=False):
            weights |= {f"{name}.{number}.{part}": weight.float() for number, weight in enumerate(stack)}
    return weights


def main(path: str) -> None:
    """Answer the job of a file, beside it."""
    job = Path(path)
    torch.save(_answer(*torch.load(job, weights_only=False)), job.with_name("found.pt"))


if __name__ == "__main__":
    # Under the name by which the parent knows the classes.
    from vlmq.eval import vllm_engine

    vllm_engine.main(sys.argv[1])
