"""Measure the trained small model and write its model card."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from vlmq.eval.easy_vqa_data import Row, as_messages, question_kind

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# shapes-vlm

A vision-language model of {n_parameters:,} parameters that answers questions about one coloured shape in a
picture of 64 x 64 pixels. It exists to try quantization on a real image, end to end, in seconds; it knows
nothing else.

A `LlavaForConditionalGeneration`: SigLIP tower (5 blocks, width 160, 64 patches), two-layer projector, Llama
decoder (7 blocks, width 192, 6 heads over 3 key-value heads, gated MLP of 544), byte-level tokenizer of 512
tokens, bfloat16. A picture takes 64 tokens, a question with its answer about 12.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## Accuracy

Test split of easy-vqa (9673 questions, 1000 pictures), exact match of the freely generated greedy answer;
"shipped" are the 512 test rows in `shapes-data/`, in equal parts of each kind of question. Kinds: what
colour, what shape, is it there ("presence"), is it not there ("absence").

| questions | test split | shipped |
|---|---|---|
{kinds}

## Training

Only the train split of the PyPI package easy-vqa (MIT licence, its notice is
in `shapes-data/LICENSE`; generated pictures and questions), from random weights,
{training_seconds} seconds on {hardware} (torch {torch}, transformers {transformers}):

    {command}
"""


@torch.inference_mode()
def measure_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: list[Row], *, batch_size: int = 64
) -> dict[str, float]:
    """Share of the rows answered right by free greedy generation, overall ("all") and by kind of question."""
    right: dict[str, list[bool]] = {"all": []}
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        inputs: Any = processor.apply_chat_template(
            [as_messages(row, with_answer=False) for row in part],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        generated = model.generate(**dict(inputs))  # pyright: ignore[reportAttributeAccessIssue]
        generated = generated[:, inputs["input_ids"].shape[1] :]
        for row, answer in zip(
            part, processor.batch_decode(generated, skip_special_tokens=True), strict=True
        ):
            is_right = answer.strip() == row["answer"]
            right["all"].append(is_right)
            right.setdefault(question_kind(row["question"]), []).append(is_right)
    return {kind: sum(flags) / len(flags) for kind, flags in right.items()}


def write_card(out: Path, record: dict[str, Any]) -> None:
    """Write `training.json` (how the model was trained, with what result) and the model card `README.md`."""
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    kinds = "\n".join(
        f"| {kind} | {record['test'][kind]:.2%} | {record['shipped_test'][kind]:.2%} |"
        for kind in record["test"]
    )
    (out / "README.md").write_text(CARD.format(kinds=kinds, **record))
