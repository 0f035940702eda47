"""Perplexity of SmolLM2-135M-Instruct after quantization: one run, one line of JSON in a results file.

    python -m vlmq.eval.smollm2 WORK --scheme int2-g64 --seed 0 --results results.jsonl

WORK is made by `vlmq.eval.smollm2_data`. Calibration: 64 x 512 tokens, evaluation: 32 x 512 tokens, no page in both.
The packed model is saved, reloaded from disk, and the reloaded model is evaluated in bfloat16. A line holds the
command, the commit, the seed, what was run, the perplexity beside the true bits per weight, and CPU seconds.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import vlmq
from vlmq.eval.perplexity import perplexity
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.smollm2_data import calibration_tokens
from vlmq.linear import QuantLinear
from vlmq.options import parse_options

BATCH_SIZE = 8


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize, save, reload, evaluate; returns the line of the results file."""
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    model = AutoModelForCausalLM.from_pretrained(work / "smollm2", dtype=torch.bfloat16).eval()
    calib = calibration_tokens(work, arguments.seed)[: arguments.n_calib]
    optional = {} if arguments.saliency is None else {"saliency": arguments.saliency}
    if arguments.alpha is not None:
        optional["alpha"] = arguments.alpha
    started, cpu = time.perf_counter(), time.process_time()
    vlmq.quantize(
        model,
        [{"input_ids": rows} for rows in calib.split(arguments.batch_size)],
        arguments.scheme,
        solver=arguments.solver,
        options=parse_options(arguments.option),
        seed=arguments.seed,
        **optional,
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    reports = [m.report for m in model.modules() if isinstance(m, QuantLinear)]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        target = Path(folder) / "model"
        vlmq.save(model, target)
        n_bytes = disk_bytes(target)
        size = model_size(model)
        del model
        reloaded = AutoModelForCausalLM.from_pretrained(target).eval()
        ppl = perplexity(reloaded, torch.load(work / "eval.pt"))
    return {
        "scheme": arguments.scheme,
        "seed": arguments.seed,
        "n_calib": arguments.n_calib,
        "perplexity": round(ppl, 3),
        "true_bits_per_weight": round(size.bits_per_weight, 4),
        "bytes_on_disk": n_bytes,
        "settings": reloaded.config.quantization_config.metadata,
        "options": parse_options(arguments.option),
        "mean_proxy_loss": sum(r.proxy_loss for r in reports if r) / len(reports),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "command": " ".join(["python -m vlmq.eval.smollm2 WORK", *sys.argv[2:]]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}",
        "tag": arguments.tag,
    }


def commit() -> str:
    """Short hash of the source tree's commit, "+" if it has changes, "" outside a repository."""
    folder = Path(__file__).resolve().parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def main() -> None:
    """Run once and append a line to the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--scheme", default="int4-g64")
    parser.add_argument("--solver")
    parser.add_argument("--saliency")
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-calib", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="rows per calibration batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tag", default="")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    line = json.dumps(run(arguments))
    print(line)
    if arguments.results is not None:
        with arguments.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
