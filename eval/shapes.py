"""The embedded vision-language model after quantization: schemes x saliencies x parts x seeds, one line each.

    python -m vlmq.eval.shapes --scheme int2-g64 --scheme ternary-g64 --saliency uniform --saliency block_grad \
        --seed 0 --seed 1 --seed 2 --parts language --parts all --results results.jsonl

Questions are the shipped test rows, or with --all-questions the 9673 test questions of the `easy-vqa` package. A seed
draws its calibration rows from the shipped training rows. Each packed model is saved, reloaded and then asked.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmq
from vlmq.eval.easy_vqa_data import as_messages, demo_model_path, load_easy_vqa, load_shapes
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.smollm2 import commit
from vlmq.eval.vqa import answer_accuracy

PARTS = {"language": {"vision": None}, "all": {}}


def run(
    scheme: str | None, saliency: str, parts: str, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Quantize once (None: the original) and ask the questions; returns a line of the results file."""
    path = demo_model_path()
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    rows = (
        load_easy_vqa("test")
        if arguments.all_questions
        else load_shapes("test", n_rows=arguments.n_questions)
    )
    line: dict[str, Any] = {"scheme": scheme, "saliency": saliency, "parts": parts, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        if scheme is not None:
            messages = [as_messages(row) for row in load_shapes("calibration")]
            calib = vlmq.calib.load(
                messages, processor, n_samples=arguments.n_samples, seed=seed, batch_size=arguments.batch_size
            )
            overrides = PARTS[parts]
            started = time.process_time()
            vlmq.quantize(
                model,
                calib,
                scheme,
                saliency=saliency,
                solver=arguments.solver,
                alpha=arguments.alpha,
                overrides=overrides,
                seed=seed,
            )
            line["cpu_seconds"] = round(time.process_time() - started, 1)
            vlmq.save(model, Path(folder) / "model", processor)
            line["bytes_on_disk"] = disk_bytes(Path(folder) / "model")
            model = vlmq.load(Path(folder) / "model")
    size = model_size(model)
    result = answer_accuracy(model, processor, rows, batch_size=64)
    line |= {
        "accuracy": round(result.accuracy, 5),
        "nll": round(result.answer_nll, 5),
        "n_questions": len(rows),
        "true_bits_per_weight": round(size.bits_per_weight, 4) if scheme else 16.0,
        "n_samples": arguments.n_samples,
        "alpha": arguments.alpha,
        "solver": arguments.solver,
        "command": " ".join(["python -m vlmq.eval.shapes", *sys.argv[1:]]),
        "commit": commit(),
    }
    return line


def main() -> None:
    """Run all combinations and append their lines to the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", action="append", default=[])
    parser.add_argument("--saliency", action="append", default=[])
    parser.add_argument("--parts", action="append", default=[], choices=PARTS)
    parser.add_argument("--seed", action="append", type=int, default=[])
    parser.add_argument("--original", action="store_true", help="also ask the original model")
    parser.add_argument("--solver")
    parser.add_argument("--alpha", type=float, default=vlmq.quantization.DEFAULT_ALPHA)
    parser.add_argument("--n-samples", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--n-questions", type=int)
    parser.add_argument("--all-questions", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    combinations = list(
        itertools.product(
            arguments.scheme,
            arguments.saliency or ["uniform"],
            arguments.parts or ["all"],
            arguments.seed or [0],
        )
    )
    if arguments.original:
        combinations.insert(0, (None, "", "", 0))
    for scheme, saliency, parts, seed in combinations:
        line = json.dumps(run(scheme, saliency, parts, seed, arguments))
        print(line, flush=True)
        if arguments.results is not None:
            with arguments.results.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
