"""The data of a distillation: split into what is learned and what validates, and dealt out step by step.

Pairs of a dual encoder are taken apart and mixed anew in each epoch, since which pairs meet in a batch matters to a
contrastive loss; other batches stay as they are and only their order is mixed. The order depends on seed and epoch
alone, so that an interrupted run goes on with the batch that was next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmq.calib.loss import reference_kind
from vlmq.calib.saliency import postprocess, prepare
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.distill_losses import Example, is_dual, predicted_places
from vlmq.distill_settings import Settings
from vlmq.families import Layout

MIN_PAIRS = 64
MIN_TOKENS = 128


@dataclass(frozen=True)
class DistillData:
    """What is learned from and what validates, and how many of the first there are in an epoch."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    batch_size: int | None

    def __len__(self) -> int:
        if self.batch_size is None:
            return len(self.train)
        return max(1, len(self.train[0].kinds) // self.batch_size)

    def epoch(self, number: int, seed: int) -> Iterator[Example]:
        """The examples of an epoch in its order."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if self.batch_size is None:
            for i in torch.randperm(len(self.train), generator=generator).tolist():
                yield self.train[i]
            return
        whole = self.train[0]
        order = torch.randperm(len(whole.kinds), generator=generator)
        for i in range(len(self)):
            yield _take(whole, order[i * self.batch_size : (i + 1) * self.batch_size])


def prepare_data(
    teacher: PreTrainedModel,
    layout: Layout,
    batches: list[CalibBatch],
    settings: Settings,
) -> DistillData:
    """Split, check, and weigh the tokens.

    Args:
        teacher: the original model; its gradients are the saliency.
        layout: its blocks.
        batches: all data.
        settings: shares, batch size, saliency and seed.

    Raises:
        ValueError: pairs that cannot be put together.
    """
    batch_size, share = settings.batch_size, settings.tuning.validation_share
    generator = torch.Generator().manual_seed(settings.seed)
    if is_dual(teacher):
        whole = _all_pairs(teacher, batches)
        n_rows = len(whole.kinds)
        order = torch.randperm(n_rows, generator=generator)
        n_validation = max(2, round(n_rows * share))
        held = [_take(whole, part) for part in order[:n_validation].split(batch_size) if len(part) > 1]
        train = _take(whole, order[n_validation:])
        return DistillData((train,), tuple(held), min(batch_size, len(train.kinds)))
    weights = _token_weights(teacher, layout, batches, settings.saliency, settings.seed)
    examples = [
        Example(dict(batch.inputs), batch.kinds, weight)
        for batch, weight in zip(batches, weights, strict=True)
    ]
    order = torch.randperm(len(examples), generator=generator).tolist()
    n_validation = max(1, round(len(examples) * share))
    return DistillData(
        tuple(examples[i] for i in order[n_validation:]),
        tuple(examples[i] for i in order[:n_validation]),
        None,
    )


def check_data(model: PreTrainedModel, batches: list[CalibBatch], saliency: str = "uniform") -> None:
    """Raise ValueError where the data has no pairs or no answers, or is too little, before any work."""
    if is_dual(model):
        if saliency != "uniform":
            raise ValueError(
                f"saliency {saliency!r} weighs the tokens of answers, a dual encoder has none; leave it out"
            )
        for i, batch in enumerate(batches):
            if not {"input_ids", "pixel_values"} <= batch.inputs.keys():
                found = ", ".join(batch.inputs)
                raise ValueError(
                    f"batch {i}: a dual encoder learns from pairs, expected input_ids and pixel_values, got {found}; "
                    "give images with captions to vlmq.calib.load"
                )
            n_rows = len(batch.inputs["input_ids"]), len(batch.inputs["pixel_values"])
            if n_rows[0] != n_rows[1]:
                raise ValueError(
                    f"batch {i}: expected one text per image, got {n_rows[0]} texts, {n_rows[1]} images"
                )
        n_pairs = sum(len(batch.inputs["input_ids"]) for batch in batches)
        if n_pairs < MIN_PAIRS:
            raise ValueError(
                f"too little data: distilling a dual encoder needs at least {MIN_PAIRS} pairs (1000 and more are "
                f"usual), got {n_pairs}"
            )
        texts = {tuple(ids[ids != 0].tolist()) for batch in batches for ids in batch.inputs["input_ids"]}
        if len(texts) < 2:
            raise ValueError(
                f"data without captions: all {n_pairs} images have the same text; give each its own"
            )
        return
    reference = reference_kind(batches)
    if reference != ANSWER and any(bool((batch.kinds == IMAGE).any()) for batch in batches):
        raise ValueError(
            "data without answers: rows with images must say what the assistant answers (a question and an answer, "
            "or a caption)"
        )
    n_tokens = sum(int(predicted_places(batch.kinds).sum()) for batch in batches)
    if n_tokens < MIN_TOKENS or len(batches) < 2:
        what = "answer tokens" if reference == ANSWER else "tokens of text"
        raise ValueError(
            f"too little data: distilling {type(model).__name__} needs at least {MIN_TOKENS} {what} in two batches "
            f"(10000 and more are usual), got {n_tokens} in {len(batches)}"
        )


def _all_pairs(model: PreTrainedModel, batches: list[CalibBatch]) -> Example:
    """All pairs as one example, texts padded to one width."""
    names = batches[0].inputs.keys()
    for i, batch in enumerate(batches):
        if batch.inputs.keys() != names:
            found, expected = ", ".join(batch.inputs), ", ".join(names)
            raise ValueError(f"batch {i}: expected the inputs {expected} as in batch 0, got {found}")
    width = max(batch.inputs["input_ids"].shape[1] for batch in batches)
    text_config = getattr(model.config, "text_config", model.config)
    fill = {"input_ids": getattr(text_config, "pad_token_id", None) or 0}
    joined = {}
    for name in names:
        parts = [batch.inputs[name] for batch in batches]
        if parts[0].ndim == 2:
            parts = [pad(part, (0, width - part.shape[1]), value=fill.get(name, 0)) for part in parts]
        joined[name] = torch.cat(parts)
    kinds = torch.cat([pad(b.kinds, (0, width - b.kinds.shape[1]), value=PADDING) for b in batches])
    return Example(joined, kinds)


def _take(example: Example, rows: Tensor) -> Example:
    inputs = {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in example.inputs.items()
    }
    return Example(inputs, example.kinds[rows])


def _token_weights(
    teacher: PreTrainedModel, layout: Layout, batches: list[CalibBatch], saliency: str, seed: int
) -> list[Tensor | None]:
    """Per batch (rows, n_tokens): the teacher's squared gradient at the output of its last layer, mean 1 over the
    positions that predict what counts; None is uniform."""
    if saliency == "uniform":
        return [None] * len(batches)
    context = prepare(saliency, teacher, layout, batches, seed=seed)
    assert context.loss_weights is not None
    last = [spec.name for spec in layout.blocks if spec.part == "language"][-1]
    scores = [calls for name, calls in context.loss_weights.items() if name.startswith(f"{last}.")][-1]
    weights: list[Tensor | None] = []
    for batch, raw in zip(batches, scores, strict=True):
        places = torch.nn.functional.pad(predicted_places(batch.kinds), (0, 1))
        kinds = torch.where(places, TEXT, PADDING).to(torch.int8)
        weights.append(postprocess(raw.view(kinds.shape), kinds, where="saliency of the answers"))
    return weights
