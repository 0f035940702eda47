"""vlmq against llama.cpp: the same random Llama, packed by both, generating greedily with the same number of threads.

    vlmq bench preset:llama-2048 --scheme ternary-g64 --scheme int4-g64 --against llama.cpp --threads 2
    python -m vlmq.eval.bench_llama_cpp --threads 1 2 --results eval/results/llama_cpp.json

A preset is packed by vlmq with random codes, embedding and head in `EMBEDDINGS`; the weights that this gives are
written as GGUF in the types of `COUNTERPARTS`, embedding and head in `HEAD_TYPE`. Each file has an engine of its own
(`vlmq.eval.engines`); they take turns, a round for all, so that what disturbs the machine disturbs all alike. The first
round warms up. A ratio is the median over the rounds of a row's speed to that of the first llama.cpp row of its kind
in the same round. `n_same` counts the leading tokens on which a row agrees with that row: activations are rounded
differently, and a random model is quick to change its mind.

The Linux wheel of xllamacpp is compiled for AVX2 and no more, which `path` shows. Other builds of llama.cpp can be
faster, so the ratio holds for this one. VLMQ_CPU_ISA=avx2 holds vlmq to the same instructions.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import vlmq
from vlmq.eval.bench_cpu import MAX_LOAD
from vlmq.eval.engines import Spec, start
from vlmq.eval.presets import PRESETS, build_preset
from vlmq.eval.report import Column, Table, as_markdown
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.smollm2 import commit
from vlmq.quantization import pack_embeddings
from vlmq.scheme import parse_scheme

NAME = "llama.cpp"
PACKAGES = ("xllamacpp", "gguf")
EMBEDDINGS = "int8-g64"
COUNTERPARTS = {
    "ternary": ("TQ2_0", "TQ1_0"),
    "int4": ("Q4_0",),
    "int4-sym": ("Q4_0",),
    "int8": ("Q8_0",),
    "int8-sym": ("Q8_0",),
}
BLOCK_WEIGHTS = {"TQ2_0": 256, "TQ1_0": 256, "Q4_0": 32, "Q8_0": 32}
SCHEMES = ("ternary-g64", "ternary-channel", "int4-g64", "int4-sym-g32")

COLUMNS = (
    Column("engine", "Engine"),
    Column("layers", "Layers"),
    Column("head", "Embedding, head"),
    Column("path", "Path"),
    Column("bits_per_weight", "True bits", ".2f"),
    Column("tokens_per_second", "Tokens/s", ".1f"),
    Column("range", "Range"),
    Column("ratio", "Ratio", ".2f"),
    Column("first_token", "First token s", ".3f"),
    Column("peak_megabytes", "Peak MB", ".0f"),
    Column("megabytes", "Disk MB", ".1f"),
    Column("n_same", "Same tokens", "d"),
)


@dataclass(frozen=True)
class Side:
    """One model of one engine: what it is, where, and which llama.cpp type it is compared with."""

    engine: str
    layers: str
    head: str
    path: Path
    bits_per_weight: float
    against: str


def check(
    preset: str, schemes: Sequence[str], *, n_prompt: int = 64, n_new: int = 64, n_runs: int = 5
) -> None:
    """Find what is wrong before any work.

    Raises:
        ValueError: a package is missing, the preset is unknown or no Llama, llama.cpp has no type for a scheme or
            none for layers of this width, or counts are below their minimum.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{NAME} is compared through {' and '.join(PACKAGES)}: pip install {' '.join(missing)}"
        )
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; known: {' '.join(PRESETS)}")
    config = PRESETS[preset]()
    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"only a Llama is written for {NAME}, preset {preset!r} is a {type(config).__name__}"
        )
    if not schemes:
        raise ValueError(f"a comparison with {NAME} needs a --scheme, such as {SCHEMES[0]}")
    for scheme in schemes:
        format_name = parse_scheme(scheme).format.name
        if format_name not in COUNTERPARTS:
            raise ValueError(
                f"{NAME} has no type for scheme {scheme!r}; known for formats: {' '.join(COUNTERPARTS)}"
            )
        for layer_type in COUNTERPARTS[format_name]:
            n = BLOCK_WEIGHTS[layer_type]
            for width in (config.hidden_size, config.intermediate_size):
                if width % n:
                    raise ValueError(
                        f"{layer_type} takes widths of {n} n, preset {preset!r} has layers of {width} inputs"
                    )
    if n_new < 2 or n_runs < 1 or n_prompt < 1:
        raise ValueError(
            f"expected at least 2 new tokens, 1 run and 1 token of prompt, got {n_new}, {n_runs} and {n_prompt}"
        )


def prepare(preset: str, schemes: Sequence[str], folder: Path, report: Callable[[str], None]) -> list[Side]:
    """Pack the preset in each scheme, write each counterpart once; what is compared stands together."""
    from vlmq.eval.gguf_model import HEAD_TYPE, block_of, write_gguf

    ours: list[Side] = []
    theirs: dict[str, Side] = {}
    for scheme in schemes:
        report(f"packing {preset} in {scheme}")
        types = COUNTERPARTS[parse_scheme(scheme).format.name]
        model = build_preset(preset, scheme)
        bits = model_size(model).bits_per_weight
        pack_embeddings(model, EMBEDDINGS)
        path = folder / scheme
        vlmq.save(model, path)
        ours.append(Side("vlmq", scheme, EMBEDDINGS, path, bits, types[0]))
        for layer_type in types:
            if layer_type not in theirs:
                report(f"writing {preset} in {layer_type}")
                path = folder / layer_type / "model.gguf"
                path.parent.mkdir()
                write_gguf(model, layer_type, path)
                n_weights, n_bytes = block_of(layer_type)
                theirs[layer_type] = Side(
                    NAME, layer_type, HEAD_TYPE, path, 8 * n_bytes / n_weights, types[0]
                )
    sides = [*ours, *theirs.values()]
    return sorted(sides, key=lambda side: [s.against for s in sides].index(side.against))


def take_turns(
    sides: Sequence[Side], threads: int, *, n_prompt: int, n_new: int, n_runs: int, vocab_size: int
) -> list[dict[str, Any]]:
    """Start an engine for each side and let them generate in turns; one record per side."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab_size, (n_prompt,), generator=generator).tolist()
    with ExitStack() as stack:
        engines = [
            stack.enter_context(start(Spec(side.engine, str(side.path), threads, prompt, n_new)))
            for side in sides
        ]
        rounds = [[engine.run() for engine in engines] for _ in range(n_runs + 1)][1:]
    bases = [next(j for j, s in enumerate(sides) if s.layers == side.against) for side in sides]
    records = []
    for i, (side, base) in enumerate(zip(sides, bases, strict=True)):
        runs = [answers[i] for answers in rounds]
        speeds = [(n_new - 1) / run["decode_seconds"] for run in runs]
        ratios = [answers[base]["decode_seconds"] / answers[i]["decode_seconds"] for answers in rounds]
        file_bytes = disk_bytes(side.path.parent if side.path.suffix else side.path)
        records.append(
            {
                "engine": side.engine,
                "layers": side.layers,
                "head": side.head,
                "path": runs[-1]["path"],
                "bits_per_weight": side.bits_per_weight,
                "tokens_per_second": statistics.median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "range": f"{min(speeds):.0f}-{max(speeds):.0f}",
                "against": side.against,
                "ratio": statistics.median(ratios),
                "first_token": statistics.median(run["first_token"] for run in runs),
                "peak_megabytes": runs[-1]["peak_bytes"] / 1e6,
                "megabytes": file_bytes / 1e6,
                "n_same": count_same(runs[-1]["tokens"], rounds[-1][base]["tokens"]),
                "threads": threads,
                "n_prompt": n_prompt,
                "n_new": n_new,
                "n_runs": n_runs,
            }
        )
    return records


def count_same(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Number of leading tokens that are the same."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def bench_llama_cpp(
    preset: str,
    schemes: Sequence[str],
    threads: Sequence[int],
    *,
    n_prompt: int = 64,
    n_new: int = 64,
    n_runs: int = 5,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[list[Table], dict[str, Any]]:
    """Compare; files are made in a temporary folder.

    Args:
        preset: a key of `PRESETS` that is a Llama.
        schemes: of vlmq, each with a counterpart.
        threads: numbers of threads, each measured.
        n_prompt: random tokens of the prompt.
        n_new: tokens generated per run.
        n_runs: counted rounds.
        report: told a line before each step.

    Returns:
        a table for each number of threads, and a record of all.

    Raises:
        ValueError: see `check`, before any work.
        RuntimeError: an engine failed; the message holds its last line.
    """
    check(preset, schemes, n_prompt=n_prompt, n_new=n_new, n_runs=n_runs)
    load = os.getloadavg()[0]
    vocab_size = PRESETS[preset]().vocab_size
    tables, groups = [], []
    with tempfile.TemporaryDirectory(prefix="vlmq-bench-") as folder:
        sides = prepare(preset, schemes, Path(folder), report)
        for n in threads:
            report(f"generating with {n} thread(s), {len(sides)} models in turns")
            counts = {"n_prompt": n_prompt, "n_new": n_new, "n_runs": n_runs}
            records = take_turns(sides, n, vocab_size=vocab_size, **counts)
            rows = tuple(tuple(record[c.key] for c in COLUMNS) for record in records)
            tables.append(Table(f"{preset} against {NAME}, {n} thread(s)", COLUMNS, rows))
            groups.append(records)
    machine = {"n_cores": os.cpu_count(), "load": load}
    versions = {name: version(name) for name in ("torch", "transformers", *PACKAGES)}
    return tables, {"preset": preset, "machine": machine, "versions": versions, "groups": groups}


def main() -> None:
    """Read the arguments, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="llama-2048")
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--n-new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    tables, record = bench_llama_cpp(
        arguments.preset,
        arguments.scheme,
        arguments.threads,
        n_new=arguments.n_new,
        n_runs=arguments.runs,
        report=print,
    )
    for table in tables:
        print(f"{table.title}\n\n{as_markdown(table)}")
    if record["machine"]["load"] > MAX_LOAD:
        print(
            f"load average {record['machine']['load']:.1f}: other jobs run here, the figures are indicative"
        )
    if arguments.results is not None:
        arguments.results.write_text(json.dumps({"commit": commit()} | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
