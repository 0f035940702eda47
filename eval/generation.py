"""How fast a model generates: time to the first token, tokens per second after it, peak memory.

A run is one greedy `generate` of a fixed number of new tokens through transformers, batch size one; the clock is read
as each token is handed out. Decode speed is that of the tokens after the first,

    (n_new - 1) / (time of the last token - time of the first)

so the prompt is in the time to the first token alone.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


class _Clock(BaseStreamer):
    """Notes when each new token is handed out; handing it out waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.tolist()
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


def generate_once(
    model: PreTrainedModel, inputs: dict[str, Any], n_new: int
) -> tuple[float, float, list[int]]:
    """Seconds to the first token, from the first to the last, and the new tokens."""
    clock = _Clock()
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # pyright: ignore[reportCallIssue]
            **inputs,
            streamer=clock,
            do_sample=False,
            max_new_tokens=n_new,
            eos_token_id=None,  # nothing ends it; `min_new_tokens` would search the vocabulary at each token
            pad_token_id=0,
        )
    if len(clock.times) != n_new:
        raise RuntimeError(f"generate handed out {len(clock.times)} tokens, expected {n_new}")
    return clock.times[0] - started, clock.times[-1] - clock.times[0], clock.tokens


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of the process for the CPU, of torch's allocator for a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says starts with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(device: torch.device) -> int:
    """Memory that is held now, counted as in `peak_bytes`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
