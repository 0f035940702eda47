"""Measure the trained small CLIP and write its model card."""

import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

from vlmq.eval.dual_encoder import retrieval, zero_shot
from vlmq.eval.scenes_data import as_labeled, load_pictures, scenes_of_two

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# shapes-clip

A CLIP of {n_parameters:,} parameters that tells coloured shapes, their sizes and places in pictures of 64 x 64 pixels.
It exists to try quantization and distillation of a dual encoder end to end, in minutes; it knows nothing else.

A `CLIPModel`: 4 vision blocks and 3 text blocks of width 128 with feed-forward layers of 512, 64 patches of 8 x 8,
embeddings of 96, byte-level tokenizer, bfloat16. Captions read "a photo of a small red circle on the left", "a green
triangle above a gray circle".

## Quality

{n_pictures} pictures of the test split of easy-vqa, 24 classes (8 colours, 3 shapes), "a photo of a ...": top-1
{top1:.2%}. {n_scenes} scenes of two of these shapes with their full captions: text to image recall at 1 {t2i:.1%}, at 5
{t2i5:.1%}; image to text {i2t:.1%} and {i2t5:.1%}.

## Training

Only the train split of the PyPI package easy-vqa (MIT licence, its notice is in `shapes-data/LICENSE`; generated
pictures), cut into shapes and put together anew, from random weights; {training_seconds} seconds on one thread of a
busy machine:

    python -m vlmq.eval.train_clip --out FOLDER --seed {seed}
"""


def write_card(folder: Path) -> None:
    """Measure the model in the folder on the whole test split and write README.md beside it."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pictures = load_pictures("test")
    found = zero_shot(model, processor, as_labeled(pictures))
    recalls = retrieval(model, processor, scenes_of_two(pictures, 500, seed=0))
    record = json.loads((folder / "training.json").read_text())
    text = CARD.format(
        **record,
        n_parameters=model.num_parameters(),
        n_pictures=found.n_images,
        top1=found.top1,
        n_scenes=recalls.n_images,
        t2i=recalls.text_to_image[1],
        t2i5=recalls.text_to_image[5],
        i2t=recalls.image_to_text[1],
        i2t5=recalls.image_to_text[5],
    )
    (folder / "README.md").write_text(text)
