"""distill: train a quantized model towards the original, from the post-training solution.

1. An original is quantized after training (`vlmq.quantize`), a copy of it is the teacher; a packed model brings its
   teacher along.
2. Packed layers give way to layers that train by straight-through estimation (`vlmq.straight_through`).
3. Adam over what is trained, on losses between student and teacher by the kind of model (`vlmq.distill_losses`); a part
   of the data is held back, and the state that is best on it is kept.
4. The layers are packed again: same formats, same sizes, a model that saves and loads like any other.

The start is already good, so little data and few steps are needed; as the state before the first step counts among
those to choose from, the loss on what was held back never grows.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlmq.attach import attach, earlier_quantizer
from vlmq.calib.batches import as_batches
from vlmq.calib.tokens import CalibBatch
from vlmq.distill_data import DistillData, check_data, prepare_data
from vlmq.distill_loop import DivergenceError, State, Trainer, fingerprint
from vlmq.distill_losses import read_losses
from vlmq.distill_settings import (
    DEFAULT_TRAINED,
    Settings,
    SilentTraining,
    TrainProgress,
    read_tuning,
    sorted_names,
)
from vlmq.embedding import QuantEmbedding
from vlmq.families import describe
from vlmq.linear import QuantLinear
from vlmq.planning import plan
from vlmq.quantization import quantize
from vlmq.scheme import Scheme
from vlmq.straight_through import TrainedLinear

QUANTIZED_FOLDER = "quantized"


def distill(
    model: PreTrainedModel,
    data: Any,
    scheme: str | Scheme = "ternary",
    teacher: PreTrainedModel | None = None,
    *,
    n_steps: int = 300,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    trained: Iterable[str] = DEFAULT_TRAINED,
    losses: Mapping[str, float] | None = None,
    saliency: str = "uniform",
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str | Scheme | None] | str | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: TrainProgress | None = None,
) -> PreTrainedModel:
    """Distil the original into the quantized model, in place, and return it packed.

    Runs on the device that accelerate chooses; under `accelerate launch` batches are shared among the processes.

    Args:
        model: an original, which is quantized first, or a packed model.
        data: as for `vlmq.quantize`: pairs for a dual encoder, rows with answers for a vision-language model, text for
            a language model.
        scheme: format and group size for an original; a packed model keeps its own.
        teacher: the original of a packed model; an original is its own teacher unless another is given.
        n_steps: most steps of Adam.
        learning_rate: at its peak; cosine to 0.
        batch_size: pairs per step of a dual encoder; other data is taken in the batches that it comes in.
        trained: of "scales", "zeros", "thresholds" (formats of at most four levels), "weights" (latent ones, so that
            any code may change), and "vectors" (biases of the packed layers, weights and biases of norms).
        losses: name -> weight, see `vlmq.distill_losses`; None takes the defaults for the kind of model.
        saliency: weights of the answers' tokens in the loss, "uniform" or "loss_grad".
        options: of `vlmq.distill_settings.Tuning`, such as {"soft_share": 0.3}.
        overrides: as for `vlmq.quantize`, for an original.
        bf16: compute student and teacher in bfloat16 (autocast); what is trained stays float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        checkpoint_dir: where the finished blocks of an original and then the state of training are written; a run with
            the same arguments goes on from there.
        seed: of the data's order and split, and of the quantization.
        progress: told about every step; None is silent.

    Raises:
        ValueError: a wrong name or value, a teacher of another architecture, data without pairs or answers, too little
            data; before any work starts.
        RuntimeError: a loss that is not finite: layer and step are named, the model holds the best state so far.
    """
    settings = Settings(
        n_steps,
        learning_rate,
        batch_size,
        sorted_names(trained),
        read_losses(model, losses),
        saliency,
        bf16,
        gradient_checkpointing,
        seed,
        read_tuning(options),
    )
    batches = as_batches(data, model)
    check_data(model, batches, saliency)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    original = _start(model, batches, scheme, teacher, overrides, seed, folder)
    parts = prepare_data(original, describe(original), batches, settings)
    state = _train(model, original, parts, settings, folder, progress or SilentTraining())
    _attach_again(model, state, settings)
    return model


def _start(
    model: PreTrainedModel,
    batches: list[CalibBatch],
    scheme: str | Scheme,
    teacher: PreTrainedModel | None,
    overrides: Mapping[str, str | Scheme | None] | str | None,
    seed: int,
    folder: Path | None,
) -> PreTrainedModel:
    """Check the teacher, and quantize an original after training; returns the teacher."""
    if earlier_quantizer(model) is not None:
        return check_teacher(model, teacher)
    plan(model, scheme, overrides=overrides)
    original = copy.deepcopy(model) if teacher is None else check_teacher(model, teacher)
    kept = None if folder is None else folder / QUANTIZED_FOLDER
    quantize(model, batches, scheme, overrides=overrides, checkpoint_dir=kept, seed=seed)
    return original


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """Check that the teacher is the original of the model: same class, same layers, same sizes.

    Raises:
        ValueError: there is none, it is quantized itself, or of another architecture; the first difference is named.
    """
    if teacher is None:
        raise ValueError("the model is packed already: give its original as teacher=")
    if any(isinstance(m, QuantLinear) for m in teacher.modules()):
        raise ValueError("the teacher is quantized itself: give the original in full precision")
    if type(teacher) is not type(model):
        raise ValueError(
            f"teacher of another architecture: expected {type(model).__name__}, got {type(teacher).__name__}"
        )
    known, own = dict(teacher.named_modules()), dict(teacher.named_parameters())
    for name, layer in packed_layers(model).items():
        shape, other = (layer.out_features, layer.in_features), known.get(name)
        found = tuple(other.weight.shape) if isinstance(other, nn.Linear) else type(other).__name__
        if found != shape:
            raise ValueError(
                f"teacher of another architecture: layer {name!r} is {shape} in the model and {found} in the teacher"
            )
    packed = [f"{n}." for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    for name, parameter in model.named_parameters():
        found = tuple(own[name].shape) if name in own else "missing"
        if found != tuple(parameter.shape) and not name.startswith(tuple(packed)):
            raise ValueError(
                f"teacher of another architecture: {name!r} is {tuple(parameter.shape)} in the model and {found} in "
                "the teacher"
            )
    return teacher


def packed_layers(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """The packed layers that can be trained: all but the table of a packed token embedding."""
    quantizer = earlier_quantizer(model)
    tables = set() if quantizer is None else set(quantizer.quantization_config.embeddings.values())
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {name: layer for name, layer in found.items() if name not in tables}


def _train(
    model: PreTrainedModel,
    original: PreTrainedModel,
    data: DistillData,
    settings: Settings,
    folder: Path | None,
    progress: TrainProgress,
) -> State:
    """Put trainable layers in place of the packed ones, train, and pack them again, whatever happens."""
    layers, weights, device = packed_layers(model), dict(original.named_modules()), model.device
    note = "distillation failed"
    with _as_it_was(model), _as_it_was(original):
        made: dict[str, TrainedLinear] = {}
        for name, layer in layers.items():
            linear: Any = weights[name]
            weight = linear.weight.detach().to(layer.qweight.device)
            made[name] = TrainedLinear(layer, weight, set(settings.trained))
            model.set_submodule(name, made[name])
        if "vectors" in settings.trained:
            _train_vectors(model)
        try:
            with _checkpointing(model, settings.gradient_checkpointing):
                mark = fingerprint(data, settings, model)
                state = Trainer(model, original, data, settings, progress, folder, mark).run()
            note = f"distilled, {state.best_step} steps"
        except DivergenceError as error:
            note = "distilled until the loss was not finite"
            raise RuntimeError(
                f"{error}; the model holds the best state before it. Lower learning_rate "
                f"(now {settings.learning_rate}), or look for values in the data that are not finite"
            ) from error
        finally:
            for name, layer in made.items():
                model.set_submodule(name, layer.packed(note))
            model.to(device)  # pyright: ignore[reportArgumentType]
    return state


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Freeze all parameters in eval mode, and give those that remain their gradients back afterwards.

    Dropout stays off: the student learns what the teacher says, not what a part of it says.
    """
    was_training, needed = model.training, {n for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in needed)
        model.train(was_training)


@contextmanager
def _checkpointing(model: PreTrainedModel, is_on: bool) -> Iterator[None]:
    """Gradient checkpointing, which transformers does in training mode only."""
    if not is_on:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def _train_vectors(model: PreTrainedModel) -> None:
    """Let norms train; the biases of packed layers do so by themselves."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def _attach_again(model: PreTrainedModel, state: State, settings: Settings) -> None:
    """Add what was done to the metadata of the checkpoint."""
    first = next(entry["validation"] for entry in state.history if "validation" in entry)
    done = {"steps": state.step, "best_step": state.best_step}
    done |= {"validation_loss": state.best_loss, "first_validation_loss": first}
    attach(model, {}, {"distilled": {**done, **asdict(settings)}})
