"""Distil a CLIP to ternary weights, on the small CLIP that ships with vlmq: offline, a few minutes on one core.

    python examples/distill_clip.py [N_STEPS]

For another CLIP or SigLIP, give its name to both `from_pretrained` and rows of {"image": ..., "caption": ...} or a
`datasets` set with such columns to `vlmq.calib.load`.
"""

import sys

import torch
from transformers import AutoModel, AutoProcessor

import vlmq
from vlmq.eval.dual_encoder import retrieval, zero_shot
from vlmq.eval.scenes_data import as_labeled, load_shipped_pictures, pairs, scenes_of_two, small_clip_path

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
name = small_clip_path()
model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(name)

test = load_shipped_pictures("test")
labeled, captioned = as_labeled(test[:96]), scenes_of_two(test, 96, seed=0)


def show(title: str) -> None:
    """Print zero-shot accuracy and recall."""
    found, recalls = zero_shot(model, processor, labeled), retrieval(model, processor, captioned)
    print(f"{title:>10}: top-1 {found.top1:.1%}, text to image recall {recalls.text_to_image[1]:.1%}")


show("original")
rows = pairs(load_shipped_pictures("calibration"), 4 * n_steps + 64, seed=0)
data = vlmq.calib.load(rows, processor, n_samples=len(rows), batch_size=32)
vlmq.distill(model, data, "ternary-g64", n_steps=n_steps)  # overrides="Q-FFN" keeps the attention as it is
show("ternary")
record = model.config.quantization_config.metadata["distilled"]
print(f"validation loss {record['first_validation_loss']:.4f} -> {record['validation_loss']:.4f}")
vlmq.save(model, "out/clip-ternary", processor)
