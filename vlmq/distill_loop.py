"""The loop of a distillation: steps, validation, the best state, checkpoints, and what stops it.

Everything that a step depends on (order of the data, learning rate, sharpness of soft codes) is a function of the seed
and the number of the step, so a run that was interrupted and goes on from its checkpoint ends in the same state.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.calib.trees import leaves, map_leaves
from vlmq.distill_data import DistillData
from vlmq.distill_losses import Example, dual_losses, forward, is_dual, token_losses
from vlmq.distill_settings import Settings, TrainProgress
from vlmq.staging import staged_file
from vlmq.straight_through import TrainedLinear

STATE_FILE = "distill_state.pt"
FIRST_SHARPNESS, LAST_SHARPNESS = 4.0, 40.0


@dataclass
class State:
    """What a checkpoint holds beside weights and optimizer."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


class DivergenceError(RuntimeError):
    """The loss or a gradient is not finite; the message says where and when."""


class Trainer:
    """One run of training over a student whose packed layers are `TrainedLinear`.

    At the peak the device holds student and teacher, two moments and a gradient per trained number, and the
    activations of one batch; the best state is kept on the CPU.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        data: DistillData,
        settings: Settings,
        progress: TrainProgress,
        folder: Path | None,
        fingerprint: str,
    ) -> None:
        """Prepare optimizer and, from the folder, the state of an interrupted run.

        Raises:
            ValueError: the folder holds the state of another run.
        """
        self.accelerator = Accelerator()
        self.student, self.teacher, self.data, self.settings = student, teacher, data, settings
        self.progress, self.folder, self.fingerprint = progress, folder, fingerprint
        self.is_dual = is_dual(teacher)
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.layers = [m for m in student.modules() if isinstance(m, TrainedLinear)]
        self.state = State()
        optimizer = torch.optim.Adam(
            list(self.trained.values()), lr=settings.learning_rate, betas=(0.9, 0.95)
        )
        self.best = self._snapshot()
        saved = self._load_state()
        if saved is not None:
            self._restore(saved["trained"])
            optimizer.load_state_dict(saved["optimizer"])
            self.best, self.state = saved["best"], State(**saved["state"])
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
        teacher.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]

    def run(self) -> State:
        """Train to the end or to an early stop; the student is left in its best state.

        Raises:
            DivergenceError: a loss or gradient is not finite; the student is in its best state then too.
        """
        settings, state = self.settings, self.state
        self.progress.start(settings.n_steps, state.step)
        try:
            if not math.isfinite(state.best_loss):
                self._validate()
            for example in self._examples():
                if self._is_over():
                    break
                self._step(example)
                if state.step % settings.tuning.eval_every == 0 or state.step == settings.n_steps:
                    self._validate()
                    self._save_state()
        finally:
            self._restore(self.best)
            self._set_sharpness(None)
            self.progress.finish()
        return state

    def _is_over(self) -> bool:
        waited = (self.state.step - self.state.best_step) // self.settings.tuning.eval_every
        return self.state.step >= self.settings.n_steps or waited > self.settings.tuning.patience

    def _examples(self) -> Iterator[Example]:
        """From the next step on: of each epoch the examples in turn, shared among the processes."""
        n, size = self.accelerator.num_processes, len(self.data)
        per_epoch = max(1, size // n)
        epoch, skip = divmod(self.state.step, per_epoch)
        while True:
            for i, example in enumerate(self.data.epoch(epoch, self.settings.seed)):
                if i < n * per_epoch and i % n == self.accelerator.process_index and i // n >= skip:
                    yield example
            epoch, skip = epoch + 1, 0

    def _step(self, example: Example) -> None:
        settings, number = self.settings, self.state.step
        progressed = number / settings.n_steps
        warm = min(1.0, (number + 1) / max(1.0, settings.tuning.warmup_share * settings.n_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progressed))
        is_soft = progressed < settings.tuning.soft_share
        ratio = LAST_SHARPNESS / FIRST_SHARPNESS
        self._set_sharpness(
            FIRST_SHARPNESS * ratio ** (progressed / settings.tuning.soft_share) if is_soft else None
        )
        losses = self._losses(example)
        total = torch.stack([settings.losses[name] * loss for name, loss in losses.items()]).sum()
        if not bool(torch.isfinite(total)):
            raise DivergenceError(self._where(example, f"loss turned {float(total.detach())}"))
        self.accelerator.backward(total)
        for name, parameter in self.trained.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise DivergenceError(f"the gradient of {name!r} is not finite in step {number + 1}")
        self.accelerator.clip_grad_norm_(self.trained.values(), settings.tuning.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer in self.layers:
            layer.keep_in_range()
        self.state.step += 1
        figures = {"total": float(total.detach())} | {n: float(v.detach()) for n, v in losses.items()}
        self.state.history.append({"step": float(self.state.step), **figures})
        self.progress.step(self.state.step, figures)

    def _losses(self, example: Example) -> dict[str, Tensor]:
        device = self.accelerator.device
        inputs = map_leaves(lambda t: self._cast(t.to(device)), dict(example.inputs))
        weights = None if example.weights is None else example.weights.to(device)
        example = Example(inputs, example.kinds.to(device), weights)
        options = {"is_dual_encoder": self.is_dual, "with_hidden": "feature" in self.settings.losses}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bf16):
            with torch.no_grad():
                target = forward(self.teacher, example, **options)
            outputs = forward(self.model, example, **options)
        found = (dual_losses if self.is_dual else token_losses)(outputs, target, example)
        return {name: found[name] for name in self.settings.losses}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.teacher.dtype) if tensor.is_floating_point() else tensor

    @torch.no_grad()
    def _validate(self) -> None:
        """Weigh the loss on what was held back, with hard codes, and keep the state if it is the best yet."""
        sharpness = self.layers[0].sharpness if self.layers else None
        self._set_sharpness(None)
        total = 0.0
        for example in self.data.validation:
            losses = self._losses(example)
            total += sum(self.settings.losses[name] * float(loss) for name, loss in losses.items())
        self._set_sharpness(sharpness)
        loss = total / len(self.data.validation)
        if not math.isfinite(loss):
            raise DivergenceError(self._where(self.data.validation[0], f"the validation loss turned {loss}"))
        is_best = loss < self.state.best_loss
        if is_best:
            self.state.best_loss, self.state.best_step, self.best = loss, self.state.step, self._snapshot()
        self.state.history.append({"step": float(self.state.step), "validation": loss})
        self.progress.validated(self.state.step, loss, is_best)

    def _where(self, example: Example, what: str) -> str:
        """A message that names the first layer whose output is not finite."""
        first: list[str] = []
        with _watch(self.student, first), torch.no_grad():
            self._losses(example)
        layer = f"layer {first[0]!r}" if first else "the loss itself (all layers are finite)"
        return f"{what} in step {self.state.step + 1}, first in {layer}"

    def _set_sharpness(self, value: float | None) -> None:
        for layer in self.layers:
            layer.sharpness = value

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])

    def _save_state(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "fingerprint": self.fingerprint,
            "trained": self._snapshot(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
        }
        with staged_file(self.folder / STATE_FILE) as partial:
            torch.save(content, partial)

    def _load_state(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / STATE_FILE).exists():
            return None
        saved = torch.load(self.folder / STATE_FILE, map_location="cpu")
        if saved["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.folder / STATE_FILE} is of another distillation (other data, scheme or settings): give the "
                "same arguments to go on with it, or another checkpoint_dir"
            )
        return saved


def fingerprint(data: DistillData, settings: Settings, student: PreTrainedModel) -> str:
    """What must be the same for a run to go on: settings, data, and the start of all that is trained."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for example in (*data.train, *data.validation):
        for leaf in leaves(example.inputs):
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _watch(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the innermost modules whose output is not finite, in the order of their calls."""

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [
                leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
            ]
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name)

        return see

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
