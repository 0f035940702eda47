"""Train the small vision-language model that ships with vlmq on the train split of easy-vqa.

The model (`demo_model.py`) is trained from random weights; the loss is the cross entropy of the answer's
tokens, so it answers by generation, not by choosing from a list. One sequence holds a picture and several
questions about it, so the tower and the picture's 64 tokens are run once:

    <s> <|user|> image x 64 | question, answer | question, answer | ...

The attention mask lets a token see the prefix and what precedes it in its own question; positions start anew
after the prefix in each question. So every question is trained exactly as if it were alone.

Augmentation: left-right flips, and moving the shape (each ground has one colour, so a cyclic shift of the
pixels moves it without a seam).

    python -m vlmq.eval.train_demo --out my-model

needs the `easy-vqa` package and, on one core with bfloat16 instructions, about 45 minutes.
"""

import argparse
import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from vlmq.eval.demo_card import measure_accuracy, write_card
from vlmq.eval.demo_model import N_IMAGE_TOKENS, build_model, build_processor
from vlmq.eval.demo_stages import STAGES, Stage, drawing_kind
from vlmq.eval.easy_vqa_data import Row, as_messages, load_easy_vqa, load_shapes

logger = logging.getLogger(__name__)

N_QUESTIONS = 6


@dataclass
class Pictures:
    """A split by picture.

    `pixels`: (n_pictures, 3, 64, 64) uint8. `questions`: per picture the token ids of each question and of
    its answer. `kinds`: per picture the kind of each question.
    """

    pixels: Tensor
    questions: list[list[tuple[list[int], list[int]]]]
    kinds: list[list[str]]


def group_by_picture(rows: list[Row], processor: LlavaProcessor) -> Pictures:
    """Collect the questions of each picture and encode everything once, through the chat template."""
    encode = processor.tokenizer.encode
    encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    by_picture: dict[int, list[Row]] = {}
    for row in rows:
        by_picture.setdefault(id(row["image"]), []).append(row)
        key = row["question"], row["answer"]
        if key not in encoded:
            chat = processor.apply_chat_template(as_messages(row))
            question, answer = chat.split("<image>")[1].split("<|assistant|>")
            question += "<|assistant|>"
            encoded[key] = (
                encode(question, add_special_tokens=False),
                encode(answer, add_special_tokens=False),
            )
    groups = list(by_picture.values())
    images = [group[0]["image"] for group in groups]
    pixels = processor.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
    return Pictures(
        pixels["pixel_values"].to(torch.uint8),
        [[encoded[row["question"], row["answer"]] for row in group] for group in groups],
        [[drawing_kind(row["question"]) for row in group] for group in groups],
    )


def move_shape(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip at random and shift the shape to a random place.

    Args:
        pixels: (3, height, width) uint8, one shape on a ground of one colour.
        generator: source of randomness.

    Returns:
        (3, height, width) uint8. A shape that touches the border is cut there, so it stays.
    """
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    ground = pixels[:, :: pixels.shape[1] - 1, :: pixels.shape[2] - 1].flatten(1).mode(dim=1).values
    is_shape = (pixels != ground[:, None, None]).any(dim=0)
    shifts = []
    for dim in (0, 1):
        place = is_shape.any(dim=1 - dim).nonzero().flatten()
        first, last, size = int(place[0]), int(place[-1]), is_shape.shape[dim]
        if first == 0 or last == size - 1:
            return pixels
        shifts.append(int(torch.randint(1 - first, size - 1 - last, (), generator=generator)))
    return pixels.roll(tuple(shifts), dims=(-2, -1))


def make_batch(
    pictures: Pictures,
    chosen: list[int],
    prefix: list[int],
    shares: dict[str, float] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Sequences of one picture and several questions each.

    Args:
        pictures: the split.
        chosen: pictures of the batch.
        prefix: token ids before the question, image tokens included.
        shares: how readily each kind of question is drawn for `N_QUESTIONS` questions about the augmented picture;
            None takes all questions and the picture as it is.
        generator: source of randomness.

    Returns:
        input_ids, labels (-100 where there is no loss), position_ids: (n_pictures, n_tokens) int64;
        attention_mask: (n_pictures, 1, n_tokens, n_tokens) bool;
        pixel_values: (n_pictures, 3, 64, 64) float32.
    """
    ids, labels, positions, segments, pixels = [], [], [], [], []
    for picture in chosen:
        image, kinds = pictures.pixels[picture], pictures.kinds[picture]
        order = range(len(kinds))
        if shares is not None:
            weights = torch.tensor([shares[kind] for kind in kinds])
            image = move_shape(image, generator)
            order = torch.multinomial(weights, min(N_QUESTIONS, len(kinds)), generator=generator).tolist()
        pixels.append(image)
        row_ids, row_labels = list(prefix), [-100] * len(prefix)
        row_positions, row_segments = list(range(len(prefix))), [0] * len(prefix)
        for segment, index in enumerate(order, start=1):
            question, answer = pictures.questions[picture][index]
            row_ids += question + answer
            row_labels += [-100] * len(question) + answer
            row_positions += range(len(prefix), len(prefix) + len(question) + len(answer))
            row_segments += [segment] * (len(question) + len(answer))
        ids.append(torch.tensor(row_ids))
        labels.append(torch.tensor(row_labels))
        positions.append(torch.tensor(row_positions))
        segments.append(torch.tensor(row_segments))
    pad = torch.nn.utils.rnn.pad_sequence
    segment = pad(segments, batch_first=True, padding_value=-1)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "position_ids": pad(positions, batch_first=True),
        "attention_mask": same.tril()[:, None],
        "pixel_values": torch.stack(pixels).float() / 127.5 - 1.0,
    }


def answer_logits(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (n_answer_tokens, vocab_size) float32 of the answers' tokens, and these tokens."""
    labels = batch.pop("labels")
    # The fused attention of the CPU backend is slower here: its backward takes half of the whole step.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = F.linear(hidden[:, :-1][wanted].float(), model.lm_head.weight)
    return logits, labels[:, 1:][wanted]


def train(
    model: LlavaForConditionalGeneration,
    pictures: Pictures,
    prefix: list[int],
    stage: Stage,
    *,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """Train in place: AdamW, linear warm-up, cosine to zero, bfloat16 autocast over float32 weights."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)
    n_pictures = len(pictures.questions)
    n_steps = stage.epochs * (n_pictures // stage.batch_size)
    model.train()
    started, step, running = time.monotonic(), 0, 0.0
    for epoch in range(stage.epochs):
        order = torch.randperm(n_pictures, generator=generator).tolist()
        for first in range(0, n_pictures - stage.batch_size + 1, stage.batch_size):
            cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * min(cosine, (step + 1) / stage.n_warmup_steps)
            batch = make_batch(
                pictures, order[first : first + stage.batch_size], prefix, stage.shares, generator
            )
            logits, targets = answer_logits(model, batch)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running += float(loss.detach())
            step += 1
            if step % 25 == 0:
                seconds = time.monotonic() - started
                logger.info(
                    "epoch %d step %d/%d loss %.4f %.0f s", epoch, step, n_steps, running / 25, seconds
                )
                running = 0.0
    model.eval()


def main() -> None:
    """Train stage by stage, saving after each; then measure the saved model and write its card."""
    parser = argparse.ArgumentParser(
        description="Train the small vision-language model that ships with vlmq."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--start", type=Path, help="folder of an earlier run: go on after its last stage")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    rows = load_easy_vqa("train")
    processor = build_processor([row["question"] for row in rows] + [row["answer"] for row in rows])
    pictures = group_by_picture(rows, processor)
    prefix = processor.apply_chat_template(as_messages(rows[0], with_answer=False)).split("<image>")[0]
    prefix_ids = processor.tokenizer.encode(prefix + "<image>" * N_IMAGE_TOKENS, add_special_tokens=False)
    stages = json.loads((arguments.start / "training.json").read_text())["stages"] if arguments.start else []
    model_path = arguments.start
    for number in range(len(stages), len(STAGES)):
        model = build_model(processor, arguments.seed)
        if model_path is not None:
            model = LlavaForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
        started = time.monotonic()
        generator = torch.Generator().manual_seed(arguments.seed + number)
        train(
            model,
            pictures,
            prefix_ids,
            STAGES[number],
            weight_decay=arguments.weight_decay,
            generator=generator,
        )
        stages.append(asdict(STAGES[number]) | {"seconds": round(time.monotonic() - started)})
        model_path = arguments.out
        model.bfloat16().save_pretrained(model_path)
        processor.save_pretrained(model_path)
        (model_path / "training.json").write_text(json.dumps({"stages": stages}))

    model = AutoModelForImageTextToText.from_pretrained(arguments.out)
    processor = AutoProcessor.from_pretrained(arguments.out)
    record = {
        "command": f"python -m vlmq.eval.train_demo --weight-decay {arguments.weight_decay} "
        f"--seed {arguments.seed} --threads {arguments.threads}",
        "hardware": f"{platform.machine()} CPU, {arguments.threads} thread(s)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stages": stages,
        "training_seconds": sum(stage["seconds"] for stage in stages),
        "n_parameters": model.num_parameters(),
        "test": measure_accuracy(model, processor, load_easy_vqa("test")),
        "shipped_test": measure_accuracy(model, processor, load_shapes("test")),
    }
    write_card(arguments.out, record)
    logger.info("%s", json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
