"""Visual question answering: exact match of the generated answer, and the likelihood of the right one.

    accuracy   = share of the questions whose greedy answer equals the right one, both normalised
    answer NLL = mean over the right answers' tokens of - log p(token | image, question, tokens before it)

The tokens of an answer include what closes the assistant's turn, since a model that never stops answers
wrongly. The negative log-likelihood moves long before an answer changes, so it is the finer measure of the
two.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.data import load
from vlmq.calib.images import open_image
from vlmq.calib.messages import read_row
from vlmq.calib.prompts import encode_chats, encode_texts, template_of
from vlmq.calib.sources import read_source
from vlmq.calib.tokens import ANSWER
from vlmq.eval.agreement import forward_logits, inputs_for
from vlmq.eval.perplexity import next_token_nll

VqaRow = Mapping[str, Any]


@dataclass(frozen=True)
class VqaResult:
    """Outcome on a set of questions.

    `accuracy` is a share of 1, `answer_nll` in nats per answer token; `answers` are the generated ones in the
    order of the questions, and `is_right` says for each whether it counted.
    """

    accuracy: float
    answer_nll: float
    answers: tuple[str, ...]
    is_right: tuple[bool, ...]

    @property
    def n_questions(self) -> int:
        """How many questions were asked."""
        return len(self.answers)


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read questions from a .jsonl or .json file with image, question, answer; image paths relative to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no rows, a row lacks a column, or its image cannot be read; the message names the row.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"questions: expected a .jsonl or .json file, there is no file {str(path)!r}")
    source = read_source(path, n_samples=2**31, seed=0)
    if not source.rows:
        raise ValueError(f"questions: {path} is empty; expected rows of image, question and answer")
    rows = []
    for index, raw in sorted(source.rows, key=lambda pair: pair[0]):
        if not isinstance(raw, Mapping) or not {"image", "question", "answer"} <= raw.keys():
            found = ", ".join(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise ValueError(f"row {index} of {path}: expected image, question and answer, got {found}")
        try:
            rows.append({**raw, "image": open_image(raw["image"], folder=source.folder)})
        except (ValueError, OSError) as error:
            raise ValueError(f"row {index} of {path}: {error}") from error
    return rows


def normalise(answer: str) -> str:
    """Lower case, without punctuation and needless spaces: what exact match compares."""
    return re.sub(r"\s+", " ", answer.lower().translate(str.maketrans("", "", string.punctuation))).strip()


def answer_accuracy(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[VqaRow],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> VqaResult:
    """Ask every question and score the answers.

    Args:
        model: an image-text-to-text model in eval mode.
        processor: its own.
        rows: mappings with "image", "question" and "answer"; of a list of answers each is right, and the
            likelihood is that of the first.
        batch_size: questions per forward.
        max_new_tokens: where an answer that does not end is cut.

    Raises:
        ValueError: there is no question.
    """
    if not rows:
        raise ValueError("no question to ask: expected at least one row with image, question and answer")
    answers = tuple(
        generate_answers(model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    )
    is_right = tuple(
        normalise(answer) in {normalise(right) for right in _right_answers(row)}
        for answer, row in zip(answers, rows, strict=True)
    )
    nll = answer_nll(model, processor, rows, batch_size=batch_size)
    return VqaResult(sum(is_right) / len(rows), nll, answers, is_right)


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[VqaRow],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """The greedy answer to each question, without special tokens; arguments as for `answer_accuracy`."""
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        inputs = inputs_for(model, encode_questions(rows[start : start + batch_size], processor))
        generate: Any = model.generate
        output: Tensor = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def encode_questions(rows: Sequence[VqaRow], processor: Any) -> dict[str, Any]:
    """Model inputs of the questions, the assistant's turn opened, padded on the left."""
    chats = [read_row(i, {k: row[k] for k in ("image", "question")}) for i, row in enumerate(rows)]
    messages, images = [c.messages for c in chats], [[open_image(i) for i in c.images] for c in chats]
    with _left_padding(processor):
        if template_of(processor):
            return encode_chats(messages, images, processor, {}, add_generation_prompt=True)
        return encode_texts(messages, images, processor, {})


def answer_nll(
    model: PreTrainedModel, processor: Any, rows: Sequence[VqaRow], *, batch_size: int = 32
) -> float:
    """Mean negative log-likelihood per token of the right answers, in nats; the arguments as above."""
    total, n_tokens = 0.0, 0
    for batch in load(list(rows), processor, n_samples=len(rows), batch_size=batch_size):
        logits = forward_logits(model, batch.inputs)
        is_answer = (batch.kinds[:, 1:] == ANSWER).to(logits.device)
        for row_logits, ids, places in zip(logits, batch.inputs["input_ids"], is_answer, strict=True):
            total += float(next_token_nll(row_logits, ids.to(logits.device))[places].double().sum())
        n_tokens += int(is_answer.sum())
    if n_tokens == 0:
        raise ValueError(
            "the rows have no answer tokens: the processor's chat template drops the assistant's turn"
        )
    return total / n_tokens


def _right_answers(row: VqaRow) -> list[str]:
    answer = row["answer"]
    return [str(a) for a in answer] if isinstance(answer, list | tuple) else [str(answer)]


@contextmanager
def _left_padding(processor: Any) -> Iterator[None]:
    """Generation continues at the end of a row, so the padding goes before it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = before
