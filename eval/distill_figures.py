"""What distillation brings on the two small models that ship with vlmq, and how fast from which start.

    python -m vlmq.eval.distill_figures clip --results eval/results/distill.jsonl
    python -m vlmq.eval.distill_figures starts --seed 0 --results eval/results/distill.jsonl
    python -m vlmq.eval.distill_figures vlm --scheme binary-channel --seed 0 --results eval/results/distill.jsonl
    python -m vlmq.eval.distill_figures speed --results eval/results/distill.jsonl

`clip`: Q-FFN and Q-ALL of the small CLIP, after quantization and after distillation: zero-shot accuracy on the shipped
test pictures, recall on 500 scenes of two things, bits, zeros, size on disk against float32.
`starts`: all linear weights ternary and latent weights trained, from exact k-means, from k-means refined by coordinate
descent on the layers' outputs, from absmean (scale mean|w|, nearest codes) and from random codes with that scale:
the training loss step by step.
`vlm`: the embedded vision-language model quantized on few rows, then distilled with uniform and with weighted answers.
`speed`: milliseconds of one image and one caption through the encoders, packed against float32, float16, bfloat16.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import vlmq
from vlmq.distill_settings import SilentTraining
from vlmq.distillation import packed_layers
from vlmq.eval.dual_encoder import retrieval, zero_shot
from vlmq.eval.easy_vqa_data import as_messages, demo_model_path, load_shapes
from vlmq.eval.scenes_data import as_labeled, load_shipped_pictures, pairs, scenes_of_two, small_clip_path
from vlmq.eval.size import model_size, sparsity
from vlmq.eval.smollm2 import commit
from vlmq.eval.vqa import answer_accuracy
from vlmq.formats import QuantizedWeight
from vlmq.formats.weight import expand_groups
from vlmq.linear import QuantLinear

SOLVED = ("kmeans", "kmeans+cd")
STARTS = (*SOLVED, "absmean", "random")

Line = dict[str, Any]


class Losses(SilentTraining):
    """Remembers the total loss of every step."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def step(self, number: int, losses: dict[str, float]) -> None:
        """Keep the total."""
        self.totals.append(losses["total"])


def clip_figures(arguments: argparse.Namespace) -> list[Line]:
    """Quality, bits and size of both presets, before and after distillation."""
    model, processor, data = _small_clip(arguments)
    test = load_shipped_pictures("test")
    labeled, captioned = as_labeled(test), scenes_of_two(test, 500, seed=0)

    def measured(name: str, measured_model: PreTrainedModel) -> Line:
        found, recalls = (
            zero_shot(measured_model, processor, labeled),
            retrieval(measured_model, processor, captioned),
        )
        layers = list(packed_layers(measured_model).values())
        line = {
            "model": name,
            "zero_shot_top1": found.top1,
            "text_to_image_1": recalls.text_to_image[1],
            "image_to_text_1": recalls.image_to_text[1],
            "n_images": found.n_images,
            "n_scenes": recalls.n_images,
        }
        if layers:
            size = model_size(measured_model)
            line |= {
                "true_bits_per_weight": size.bits_per_weight,
                "disk_bits_per_weight": size.disk_bits_per_weight,
                "smaller_than_float32": 32 / size.disk_bits_per_weight,
                "sparsity": sparsity(layers),
                "coverage": size.coverage,
            }
        return line

    lines = [measured("original", model)]
    for preset in ("Q-FFN", "Q-ALL"):
        packed = vlmq.quantize(
            copy.deepcopy(model), data[: arguments.n_calibration // 32], arguments.scheme, overrides=preset
        )
        lines.append(measured(f"{preset} quantized", packed))
        started = time.process_time()
        vlmq.distill(packed, data, teacher=model, n_steps=arguments.n_steps, seed=arguments.seed)
        line = measured(f"{preset} distilled", packed) | {"cpu_seconds": time.process_time() - started}
        with tempfile.TemporaryDirectory() as folder:
            vlmq.save(packed, Path(folder) / "model", processor)
            vlmq.load(Path(folder) / "model")
        lines.append(line | _losses(packed))
    return lines


def start_figures(arguments: argparse.Namespace) -> list[Line]:
    """The training loss from three starts with the same data in the same order."""
    model, _, data = _small_clip(arguments)
    few = data[: arguments.n_calibration // 32]
    lines = []
    for name in arguments.start or STARTS:
        solver = name if name in SOLVED else "kmeans"
        packed = vlmq.quantize(copy.deepcopy(model), few, arguments.scheme, solver=solver, alpha=0.0)
        if name not in SOLVED:
            generator = torch.Generator().manual_seed(arguments.seed)
            for path, layer in packed_layers(packed).items():
                weight: Any = model.get_submodule(path).weight
                packed.set_submodule(
                    path, absmean(layer, weight.detach(), generator if name == "random" else None)
                )
        log = Losses()
        vlmq.distill(
            packed,
            data,
            teacher=model,
            n_steps=arguments.n_steps,
            trained=("scales", "weights"),
            options={"eval_every": arguments.n_steps},
            batch_size=32,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            progress=log,
        )
        lines.append({"start": name, "losses": [round(loss, 5) for loss in log.totals]} | _losses(packed))
    return lines


def absmean(layer: QuantLinear, weight: torch.Tensor, generator: torch.Generator | None) -> QuantLinear:
    """A ternary layer with the scale mean|w| of each group and the nearest codes, or random ones."""
    start = layer.quantized_weight()
    size = layer.group_size or layer.in_features
    groups = [part.float().abs().mean(1) for part in weight.split(size, dim=1)]
    scales = torch.stack(groups, dim=1)[..., None].half()
    if generator is None:
        wide = expand_groups(scales.float(), layer.group_size, layer.in_features)[..., 0]
        codes = (weight / wide).round().clamp(-1, 1) + 1
    else:
        codes = torch.randint(0, 3, weight.shape, generator=generator)
    made = QuantizedWeight(codes.to(torch.uint8), scales, None, start.format, layer.group_size)
    return QuantLinear.from_quantized(made, layer.bias, dtype=layer.dtype)


def vlm_figures(arguments: argparse.Namespace) -> list[Line]:
    """The embedded vision-language model: the original, quantized, and distilled with both weightings."""
    path = demo_model_path()
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    rows = load_shapes("test", n_rows=arguments.n_questions)
    messages = [as_messages(row) for row in load_shapes("calibration")]
    few = vlmq.calib.load(
        messages, processor, n_samples=arguments.n_calibration, seed=arguments.seed, batch_size=16
    )
    data = vlmq.calib.load(messages, processor, n_samples=256, seed=arguments.seed, batch_size=16)
    packed = vlmq.quantize(copy.deepcopy(model), few, arguments.scheme, seed=arguments.seed)
    found = {"original": model, "quantized": packed}
    seconds = {}
    for saliency in ("uniform", "loss_grad"):
        found[saliency] = copy.deepcopy(packed)
        started = time.process_time()
        vlmq.distill(
            found[saliency],
            data,
            teacher=model,
            saliency=saliency,
            n_steps=arguments.n_steps,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
        )
        seconds[saliency] = round(time.process_time() - started, 1)
    lines = []
    for name, measured in found.items():
        result = answer_accuracy(measured, processor, rows, batch_size=64)
        line = {"model": name, "accuracy": result.accuracy, "nll": round(result.answer_nll, 5)}
        line |= {"n_questions": len(rows), "cpu_seconds": seconds.get(name)}
        lines.append(line | (_losses(measured) if name in seconds else {}))
    return lines


def speed_figures(arguments: argparse.Namespace) -> list[Line]:
    """Milliseconds per call, the median of 60 in turns, of each encoder with one row."""
    model, processor, data = _small_clip(arguments)
    packed = vlmq.quantize(copy.deepcopy(model), data[:2], arguments.scheme).bfloat16()
    image = processor.image_processor(load_shipped_pictures("test")[0].scene.image, return_tensors="pt")
    text = dict(processor.tokenizer("a photo of a red circle", return_tensors="pt"))
    pixels = image["pixel_values"]
    models: dict[str, Any] = {"float32": model, "packed": packed}
    models |= {str(dtype)[6:]: copy.deepcopy(model).to(dtype) for dtype in (torch.float16, torch.bfloat16)}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, known in models.items():
        calls[name, "image"] = lambda m=known: m.get_image_features(pixels.to(m.dtype))
        calls[name, "text"] = lambda m=known: m.get_text_features(**text)
    times = _take_turns(calls)
    return [
        {"model": name, "encoder": side, "milliseconds": 1000 * median(seconds)}
        for (name, side), seconds in times.items()
    ]


@torch.inference_mode()
def _take_turns(calls: dict[tuple[str, str], Callable[[], Any]]) -> dict[tuple[str, str], list[float]]:
    """Seconds of 60 rounds after 10 others; in a round each is called twice, and the second call counts."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(70):
        for key, call in calls.items():
            call()
            started = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - started)
    return {key: seconds[10:] for key, seconds in times.items()}


def _small_clip(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any, Any]:
    """The model in float32, its processor, and pairs of the shipped calibration pictures in batches of 32."""
    model = AutoModel.from_pretrained(small_clip_path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(small_clip_path())
    rows = pairs(load_shipped_pictures("calibration"), arguments.n_pairs, seed=arguments.seed)
    data = vlmq.calib.load(rows, processor, n_samples=len(rows), batch_size=32, seed=arguments.seed)
    return model, processor, data


def _losses(model: PreTrainedModel) -> Line:
    """Validation loss before and after, and the steps taken, of a distilled model."""
    quantizer: Any = model.config.quantization_config
    record = quantizer.metadata["distilled"]
    return {key: record[key] for key in ("first_validation_loss", "validation_loss", "steps", "best_step")}


FIGURES = {"clip": clip_figures, "starts": start_figures, "vlm": vlm_figures, "speed": speed_figures}


def main() -> None:
    """Measure one part and append its lines to the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=FIGURES)
    parser.add_argument("--scheme", default="ternary-channel")
    parser.add_argument("--start", action="append", choices=STARTS, help="of `starts`; all unless told")
    parser.add_argument("--n-pairs", type=int, default=1024)
    parser.add_argument("--n-calibration", type=int, default=256, help="pairs or rows for quantization")
    parser.add_argument("--n-questions", type=int, default=512)
    parser.add_argument("--n-steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = {key: value for key, value in vars(arguments).items() if key not in ("results", "start")}
    shared |= {
        "command": " ".join(["python -m vlmq.eval.distill_figures", *sys.argv[1:]]),
        "commit": commit(),
    }
    for line in FIGURES[arguments.part](arguments):
        text = json.dumps(line | shared)
        print(text, flush=True)
        if arguments.results is not None:
            with arguments.results.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
