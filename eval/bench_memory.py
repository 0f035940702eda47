"""What `vlmq.quantize` needs in memory beside the model, and where in its course the most.

    python -m vlmq.eval.bench_memory --blocks 2 --threads 1 --jsonl eval/results/memory.jsonl

A model of random weights is quantized on random tokens in a process of its own, whose memory is what the process holds
on a CPU and what torch's allocator holds on a GPU. The peak is the one over the whole call less what was held before
it, when only the model was there. Another thread looks at the memory every few milliseconds, and notes the functions
that are at work where it is larger than ever. Random weights need what trained ones do; the checksum of the packed
layers shows whether two commits give the same bits. From the second block on the two paths of calibration have parted,
and what is held grows little, so two blocks are enough to compare commits.
"""

import argparse
import json
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch

import vlmq
from vlmq.eval.generation import held_bytes, peak_bytes
from vlmq.eval.presets import PRESETS, build_random
from vlmq.eval.smollm2 import commit
from vlmq.families import describe
from vlmq.integrity import checksum
from vlmq.linear import QuantLinear
from vlmq.progress import SilentProgress
from vlmq.report import LayerReport

LOOK_SECONDS = 0.005
RESET_PEAK = Path("/proc/self/clear_refs")  # of Linux
N_SHOWN = 3


@dataclass(frozen=True)
class Job:
    """One call of `quantize`.

    Attributes:
        model: a preset, see `vlmq.eval.presets`.
        n_layers: decoder layers of it; None takes as many as the preset has.
        n_blocks: so many blocks, from the first, are quantized, and the others kept; None quantizes all.
        scheme: format and group size.
        solver: a recipe; None takes the default of the format.
        n_rows: rows of calibration tokens.
        length: tokens of each.
        device: such as "cuda".
        threads: threads of torch on the CPU; None leaves torch's choice.
    """

    model: str
    n_layers: int | None = None
    n_blocks: int | None = None
    scheme: str = "int4-g128"
    solver: str | None = None
    n_rows: int = 64
    length: int = 512
    device: str = "cpu"
    threads: int | None = None


class _Watch(SilentProgress):
    """Looks at the memory from a thread of its own while it is a context, and hears which layers are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.largest = 0
        self.where: list[str] = []
        self.n_done = self.n_done_then = 0
        self._working = threading.get_ident()
        self._ended = threading.Event()

    def layer(self, report: LayerReport, block_name: str) -> None:
        self.n_done += 1

    def __enter__(self) -> "_Watch":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            held = held_bytes(self.device)
            frame = sys._current_frames().get(self._working)
            if held > self.largest and frame is not None:
                self.largest, self.where = held, _names(frame)[:N_SHOWN]
                self.n_done_then = self.n_done


def _names(frame: FrameType) -> list[str]:
    """The functions of vlmq that are at work, innermost first."""
    calls = ((f.f_globals["__name__"], f.f_code.co_name) for f, _ in walk_stack(frame))
    return [f"{module.removeprefix('vlmq.')}.{name}" for module, name in calls if module.startswith("vlmq.")]


def measure(job: Job) -> dict[str, Any]:
    """Quantize in this process; memory in bytes, and what it was for."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    config = PRESETS[job.model]()
    text = config.get_text_config()
    text.num_hidden_layers = job.n_layers or text.num_hidden_layers
    model = build_random(config, None, device=job.device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(text.vocab_size, (job.n_rows, job.length), generator=generator)
    blocks = [block.name for block in describe(model).blocks]
    kept = {f"{name}.*": None for name in blocks[job.n_blocks :]} if job.n_blocks is not None else None
    weight_bytes, n_parameters = sum(p.nbytes for p in model.parameters()), model.num_parameters()
    before = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET_PEAK.exists():
        RESET_PEAK.write_text("5")
    elif peak_bytes(device) > before + weight_bytes // 10:
        raise RuntimeError(
            f"building {job.model} took more than it holds: the peak would not be that of quantize"
        )
    started = time.perf_counter()
    with _Watch(device) as watch:
        vlmq.quantize(model, rows, job.scheme, solver=job.solver, overrides=kept, progress=watch)
    seconds = time.perf_counter() - started
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    parts = (
        (f"{name}.{leaf}", p.detach().cpu()) for name, m in packed.items() for leaf, p in m.named_parameters()
    )
    extra = peak_bytes(device) - before
    return {
        **asdict(job),
        "n_parameters": n_parameters,
        "weight_bytes": weight_bytes,
        "extra_bytes": extra,
        "times_the_weights": 1 + extra / weight_bytes,
        "held_after_bytes": held_bytes(device) - before,
        "peak_in": watch.where,
        "layers_done_at_peak": watch.n_done_then,
        "seconds": round(seconds, 1),
        "packed": checksum(parts),
        "torch": torch.__version__,
    }


def main() -> None:
    """Read the arguments, measure in a fresh process, print, and append a line to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="llama-1536", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int, help="quantize the first ones only, which takes less time")
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--solver")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--jsonl", type=Path)
    a = parser.parse_args()
    job = Job(a.model, a.layers, a.blocks, a.scheme, a.solver, a.rows, a.length, a.device, a.threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        record = {"commit": commit(), **pool.submit(measure, job).result()}
    gibibytes = (record[key] / 2**30 for key in ("weight_bytes", "extra_bytes"))
    print("weights {:.2f} GiB, quantize {:.2f} GiB more".format(*gibibytes), end="")
    print(f" ({record['times_the_weights']:.2f} times the weights in all), {record['seconds']:.0f} s")
    print(f"peak in {' < '.join(record['peak_in'])}, {record['layers_done_at_peak']} layers being done")
    if a.jsonl is not None:
        with a.jsonl.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
