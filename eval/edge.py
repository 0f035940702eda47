"""Original, int4, ternary and binary on this CPU: speed of generation, memory, quality, in one table.

    python -m vlmq.eval.edge OUT --smollm2 WORK --threads 2 --results eval/results/edge.json

quantizes the small model that ships with vlmq and SmolLM2-135M (WORK is made by `vlmq.eval.smollm2_data`; left out
without it) to three widths, and the ternary ones once more with embeddings in 8 bits; keeps the checkpoints in OUT, and
measures each in a process of its own. Checkpoints that are in OUT already are measured again but not made again;
quantizing SmolLM2 takes about five minutes per width. Nothing else should run on the machine.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import vlmq
from vlmq.eval.bench_models import SHAPES, Job, bench_models
from vlmq.eval.demo import SALIENCY
from vlmq.eval.easy_vqa_data import as_messages, demo_model_path, load_shapes
from vlmq.eval.report import as_markdown
from vlmq.eval.smollm2 import BATCH_SIZE, commit
from vlmq.eval.smollm2_data import calibration_tokens
from vlmq.quantization import pack_embeddings

SCHEMES = ("int4-g64", "ternary-g64", "binary-g64")
EMBEDDINGS = "int8-g64"
N_RUNS = 11
N_WINDOWS = 8  # of 512 tokens, once at a time and once through the cache


def pack_shapes(scheme: str, folder: Path) -> None:
    """Quantize the model that ships with vlmq as the demo does, and save it."""
    path = demo_model_path()
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    rows = [as_messages(row) for row in load_shapes("calibration", n_rows=128)]
    vlmq.quantize(
        model, vlmq.calib.load(rows, processor, n_samples=128, batch_size=16), scheme, saliency=SALIENCY
    )
    vlmq.save(model, folder, processor)


def pack_smollm2(work: Path, scheme: str, folder: Path) -> None:
    """Quantize SmolLM2-135M on its fixed calibration set, and save it."""
    model = AutoModelForCausalLM.from_pretrained(work / "smollm2", dtype=torch.bfloat16).eval()
    rows = calibration_tokens(work, 0).split(BATCH_SIZE)
    vlmq.quantize(model, [{"input_ids": part} for part in rows], scheme)
    vlmq.save(model, folder, AutoTokenizer.from_pretrained(work / "smollm2"))


def pack_missing(out: Path, name: str, pack: Callable[[str, Path], None]) -> list[str]:
    """Make what is missing of one model in OUT; returns its folders, the narrow embeddings last."""
    folders = []
    for scheme in SCHEMES:
        folder = out / f"{name}-{scheme}"
        if not folder.exists():
            print(f"packing {folder.name}", flush=True)
            pack(scheme, folder)
        folders.append(folder)
    folder = out / f"{name}-{SCHEMES[1]}-{EMBEDDINGS}-embeddings"
    if not folder.exists():
        ternary = str(folders[1])
        model = pack_embeddings(vlmq.load(ternary), EMBEDDINGS)
        vlmq.save(model, folder, AutoProcessor.from_pretrained(ternary))
    return [str(made) for made in (*folders, folder)]


def jobs_of(out: Path, work: Path | None, threads: int) -> list[list[Job]]:
    """Make what is missing in OUT; returns one list of jobs per model, the original first."""
    shapes = [str(demo_model_path()), *pack_missing(out, "shapes-vlm", pack_shapes)]
    groups = [[Job(model, threads=threads, n_runs=N_RUNS, vqa=SHAPES) for model in shapes]]
    if work is not None:
        packed = pack_missing(out, "smollm2", partial(pack_smollm2, work))
        original = out / "smollm2-bfloat16"
        if not original.exists():
            tokenizer = AutoTokenizer.from_pretrained(work / "smollm2")
            model = AutoModelForCausalLM.from_pretrained(work / "smollm2", dtype=torch.bfloat16)
            model.save_pretrained(original)
            tokenizer.save_pretrained(original)
        smollm2 = [str(original), *packed]
        groups.append(
            [
                Job(model, threads=threads, n_runs=N_RUNS, text=str(work / "eval.pt"), n_windows=N_WINDOWS)
                for model in smollm2
            ]
        )
    return groups


def main() -> None:
    """Pack what is missing, measure, print the tables, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", type=Path, metavar="WORK")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    content = {"commit": commit(), "machine": platform.machine(), "groups": []}
    for jobs in jobs_of(arguments.out, arguments.smollm2, arguments.threads):
        table, records = bench_models(jobs, report=print)
        print(as_markdown(table))
        for record in records:
            record["model"] = Path(record["model"]).name
        content["groups"].append(records)
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
