"""One engine with one model in a process of its own, which generates once for each line that it is sent.

    with start(Spec("llama.cpp", "model.gguf", threads=2, prompt=[5, 6, 7], n_new=64)) as engine:
        record = engine.run()

So several engines can take turns in one run, each with its own threads and its own peak of memory, none of them busy
while another is timed. vlmq generates through transformers, llama.cpp through the server in the package `xllamacpp`,
both greedily, batch size one. Decode time is that of the tokens after the first, by the clock of the engine itself:

    (n_new - 1) / decode_seconds        tokens per second
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmq.eval import child
from vlmq.eval.child import Child
from vlmq.eval.generation import generate_once, held_bytes, peak_bytes
from vlmq.kernels.cpu import isa_in_use
from vlmq.opening import open_model

CPU = torch.device("cpu")
LLAMA_CPP_SIMD = ("AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "DOTPROD", "NEON")


@dataclass(frozen=True)
class Spec:
    """What a process does.

    Attributes:
        engine: a key of `ENGINES`.
        path: folder of a packed model, or GGUF file.
        threads: threads of the engine.
        prompt: token ids.
        n_new: tokens generated per run, at least 2.
    """

    engine: str
    path: str
    threads: int
    prompt: list[int]
    n_new: int


@dataclass(frozen=True)
class Opened:
    """A model that is ready: `generate` returns the seconds to the first token, those after it, and the tokens."""

    generate: Callable[[], tuple[float, float, list[int]]]
    path: str


class Engine:
    """The parent's end of a process."""

    def __init__(self, spec: Spec, child: Child) -> None:
        self.spec = spec
        self.child = child

    def run(self) -> dict[str, Any]:
        """Generate once; seconds, tokens, bytes at the peak so far, and the instruction set in use.

        Raises:
            RuntimeError: the process has ended; the message holds its last line.
        """
        return self.child.ask("run")


@contextmanager
def start(spec: Spec) -> Iterator[Engine]:
    """Start a process; it is ended when the context is left."""
    name = f"{spec.engine} on {spec.path}"
    with child.start("vlmq.eval.engines", json.dumps(asdict(spec)), name) as process:
        yield Engine(spec, process)


def open_vlmq(spec: Spec) -> Opened:
    """Load a packed checkpoint in transformers."""
    torch.set_num_threads(spec.threads)
    model = open_model(spec.path)
    ids = torch.tensor([spec.prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Opened(lambda: generate_once(model, inputs, spec.n_new), isa_in_use())


def open_llama_cpp(spec: Spec) -> Opened:
    """Load a GGUF file whose token i is the text "i" in llama.cpp's server, without its network part."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = spec.path
    params.n_ctx = len(spec.prompt) + spec.n_new + 1
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    request = {
        "prompt": spec.prompt,
        "max_tokens": spec.n_new,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def generate() -> tuple[float, float, list[int]]:
        answer = server.handle_completions(request)
        timings = answer["timings"]
        if timings["predicted_n"] != spec.n_new:
            raise RuntimeError(f"llama.cpp made {timings['predicted_n']} tokens, expected {spec.n_new}")
        # The clock of predicted_ms starts when the first token is there.
        return (
            timings["prompt_ms"] / 1e3,
            timings["predicted_ms"] / 1e3,
            [int(word) for word in answer["choices"][0]["text"].split()],
        )

    flags = {part.split("=")[0].strip() for part in xllamacpp.get_system_info().split("|") if "= 1" in part}
    flags = {flag.removeprefix("CPU :").strip() for flag in flags}
    return Opened(generate, next((simd.lower() for simd in LLAMA_CPP_SIMD if simd in flags), "plain"))


ENGINES: dict[str, Callable[[Spec], Opened]] = {"vlmq": open_vlmq, "llama.cpp": open_llama_cpp}


def main() -> None:
    """Answer the parent about the engine that the JSON in the first argument describes."""
    spec = Spec(**json.loads(sys.argv[1]))
    opened, before = None, 0

    def answer(_: str) -> dict[str, Any]:
        nonlocal opened, before
        if opened is None:
            before = held_bytes(CPU)
            opened = ENGINES[spec.engine](spec)
        first, decode, tokens = opened.generate()
        peak = peak_bytes(CPU) - before
        record = {"first_token": first, "decode_seconds": decode, "tokens": tokens, "peak_bytes": peak}
        return record | {"path": opened.path}

    child.serve(answer)


if __name__ == "__main__":
    main()
