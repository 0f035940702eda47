"""Distil a vision-language model to one bit, on the small model that ships with vlmq: offline, minutes on one core.

    python examples/distill_vlm.py [N_STEPS]

For another model, give its name to both `from_pretrained` and rows with image, question and answer (a .jsonl, a
`datasets` set) to `vlmq.calib.load`.
"""

import copy
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmq
from vlmq.eval.easy_vqa_data import as_messages, demo_model_path, load_shapes
from vlmq.eval.vqa import answer_nll

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
name = demo_model_path()
original = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(name)
questions = load_shapes("test", n_rows=32)

rows = [as_messages(row) for row in load_shapes("calibration", n_rows=min(256, 6 * n_steps + 48))]
data = vlmq.calib.load(rows, processor, n_samples=len(rows), batch_size=16)
packed = vlmq.quantize(copy.deepcopy(original), data[:1], "binary-channel")
print(f"original    answer NLL {answer_nll(original, processor, questions):.4f}")
print(f"quantized   answer NLL {answer_nll(packed, processor, questions):.4f}")

# Answers weighted by the gradient of their loss; a run that is interrupted goes on from the checkpoint.
vlmq.distill(
    packed,
    data,
    teacher=original,
    saliency="loss_grad",
    n_steps=n_steps,
    checkpoint_dir="out/vlm-binary-state",
)
print(f"distilled   answer NLL {answer_nll(packed, processor, questions):.4f}")
vlmq.save(packed, "out/vlm-binary", processor)
