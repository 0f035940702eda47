"""All measures of a model in one table, before and after: what `vlmq eval` prints.

Perplexity on text, accuracy and answer likelihood on questions, zero-shot accuracy and retrieval of dual encoders, and,
where the original is given, the same of the original and how far the model's predictions are from it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.data import load
from vlmq.calib.tokens import ANSWER
from vlmq.eval.agreement import agreement
from vlmq.eval.dual_encoder import RANKS, TEMPLATE_SETS, check_dual, retrieval, zero_shot
from vlmq.eval.labeled import CaptionedImages, LabeledImages
from vlmq.eval.perplexity import perplexity
from vlmq.eval.report import Column, Table
from vlmq.eval.size import model_size
from vlmq.eval.vqa import VqaRow, answer_accuracy

COLUMNS = (
    Column("model", "Model"),
    Column("bits_per_parameter", "Bits per parameter", ".2f"),
    Column("perplexity", "Perplexity", ".2f"),
    Column("accuracy", "Accuracy", ".1%"),
    Column("answer_nll", "Answer NLL", ".4f"),
    Column("text_kl", "KL on text", ".4f"),
    Column("text_top1", "Same top token on text", ".1%"),
    Column("answer_kl", "KL on answers", ".4f"),
    Column("answer_top1", "Same top token in answers", ".1%"),
    Column("zero_shot_top1", "Zero-shot top-1", ".1%"),
    Column("zero_shot_top5", "Zero-shot top-5", ".1%"),
    *(Column(f"text_to_image_{k}", f"Text to image R@{k}", ".1%") for k in RANKS),
    *(Column(f"image_to_text_{k}", f"Image to text R@{k}", ".1%") for k in RANKS),
)


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    *,
    token_ids: Tensor | None = None,
    rows: Sequence[VqaRow] | None = None,
    labeled: LabeledImages | None = None,
    templates: Sequence[str] = TEMPLATE_SETS["photo"],
    captioned: CaptionedImages | None = None,
    original: PreTrainedModel | None = None,
    batch_size: int = 8,
) -> Table:
    """Measure a model, and the original beside it.

    Args:
        model: the model in question.
        processor: its own; only questions need it.
        token_ids: (n_rows, length) of text, for perplexity.
        rows: questions with image and answer.
        labeled: images to classify, for a dual encoder.
        templates: texts with {} for a class, for the same.
        captioned: images and captions to find by each other, for a dual encoder.
        original: the model before quantization; None leaves out its row and the agreement.
        batch_size: rows per forward.

    Returns:
        A row per model, the original first; columns of what was not asked for are left out.

    Raises:
        ValueError: nothing to measure on, images with labels or captions for a model that is no dual encoder, or a
            batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if token_ids is None and not rows and labeled is None and captioned is None:
        raise ValueError("nothing to measure: give a text, questions, or images with labels or captions")
    if labeled is not None or captioned is not None:
        check_dual(model)
    records = []
    for name, measured in (("original", original), ("model", model)):
        if measured is None:
            continue
        record: dict[str, Any] = {
            "model": name,
            "bits_per_parameter": model_size(measured).bits_per_parameter,
        }
        if token_ids is not None:
            record["perplexity"] = perplexity(measured, token_ids, batch_size=batch_size)
        if rows:
            result = answer_accuracy(measured, processor, rows, batch_size=batch_size)
            record |= {"accuracy": result.accuracy, "answer_nll": result.answer_nll}
        if labeled is not None:
            found = zero_shot(measured, processor, labeled, templates=templates, batch_size=batch_size)
            record |= {"zero_shot_top1": found.top1, "zero_shot_top5": found.top5}
        if captioned is not None:
            recalls = retrieval(measured, processor, captioned, batch_size=batch_size)
            record |= {f"text_to_image_{k}": value for k, value in recalls.text_to_image.items()}
            record |= {f"image_to_text_{k}": value for k, value in recalls.image_to_text.items()}
        records.append(record)
    if original is not None and token_ids is not None:
        same = agreement(model, original, token_ids)
        records[-1] |= {"text_kl": same.kl, "text_top1": same.top1}
    if original is not None and rows:
        batches = load(list(rows), processor, n_samples=len(rows), batch_size=batch_size)
        same = agreement(model, original, batches, kinds=(ANSWER,))
        records[-1] |= {"answer_kl": same.kl, "answer_top1": same.top1}
    columns = tuple(c for c in COLUMNS if any(c.key in record for record in records))
    return Table("Evaluation", columns, tuple(tuple(r.get(c.key) for c in columns) for r in records))
