"""How to distil: the settings of a run, checked before any work, and who is told of its progress."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, get_type_hints

from vlmq.options import check_types
from vlmq.straight_through import TRAINABLE

DEFAULT_TRAINED = ("scales", "zeros", "thresholds")
SALIENCIES = ("uniform", "loss_grad")


@dataclass(frozen=True)
class Tuning:
    """Settings that rarely need another value: the `options` of `distill`.

    Attributes:
        soft_share: share of the steps with soft codes that harden, for formats of at most four levels.
        warmup_share: share of the steps over which the learning rate rises.
        validation_share: share of the data held back for choosing the best state.
        eval_every: steps between two validations, each of which also writes a checkpoint.
        patience: validations in a row that may bring nothing before training stops.
        max_norm: gradients are clipped to this norm.
    """

    soft_share: float = 0.0
    warmup_share: float = 0.05
    validation_share: float = 0.1
    eval_every: int = 25
    patience: int = 4
    max_norm: float = 1.0


@dataclass(frozen=True)
class Settings:
    """All that a run of training depends on beside model and data; see `vlmq.distill`."""

    n_steps: int
    learning_rate: float
    batch_size: int
    trained: tuple[str, ...]
    losses: dict[str, float]
    saliency: str
    bf16: bool
    gradient_checkpointing: bool
    seed: int
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        """Check the numbers and names.

        Raises:
            ValueError: one is out of its range or unknown.
        """
        tuning = self.tuning
        least = {
            "n_steps": (self.n_steps, 1),
            "batch_size": (self.batch_size, 2),
            "eval_every": (tuning.eval_every, 1),
            "patience": (tuning.patience, 1),
        }
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        for name, value in {"learning_rate": self.learning_rate, "max_norm": tuning.max_norm}.items():
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        for name, value in {"warmup_share": tuning.warmup_share, "soft_share": tuning.soft_share}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
        if not 0 < tuning.validation_share < 1:
            raise ValueError(
                f"validation_share: expected a share above 0 and below 1, got {tuning.validation_share}"
            )
        if self.saliency not in SALIENCIES:
            known = " ".join(SALIENCIES)
            raise ValueError(f"saliency {self.saliency!r} does not weigh answers; known: {known}")
        unknown = sorted(set(self.trained) - set(TRAINABLE))
        if unknown or not self.trained:
            raise ValueError(f"trained: expected some of {' '.join(TRAINABLE)}, got {unknown or 'nothing'}")
        if tuning.soft_share > 0 and not {"weights", "thresholds"} & set(self.trained):
            raise ValueError(
                "soft_share needs codes that can change: add 'weights' or 'thresholds' to trained"
            )


def read_tuning(options: Mapping[str, Any] | None) -> Tuning:
    """Options by name, checked.

    Raises:
        ValueError: an unknown name.
        TypeError: a value of another type.
    """
    return Tuning(**check_types(options or {}, get_type_hints(Tuning), "distill"))


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in one order."""
    return tuple(sorted(set(names)))


class TrainProgress(Protocol):
    """What `distill` tells its caller; it only listens."""

    def start(self, n_steps: int, first: int) -> None:
        """Training begins after step `first` of `n_steps`."""
        ...

    def step(self, number: int, losses: dict[str, float]) -> None:
        """A step is done; its losses by name, `total` their weighted sum."""
        ...

    def validated(self, number: int, loss: float, is_best: bool) -> None:
        """The loss on what was held back, after that many steps."""
        ...

    def finish(self) -> None:
        """Training has ended, with or without an error."""
        ...


class SilentTraining:
    """The default: says nothing."""

    def start(self, n_steps: int, first: int) -> None:
        """Ignore it."""

    def step(self, number: int, losses: dict[str, float]) -> None:
        """Ignore it."""

    def validated(self, number: int, loss: float, is_best: bool) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""
