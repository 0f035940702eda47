"""The records of a run: one quantized layer, one pass of the learning of a block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one linear layer gave.

    `name` is the module path, `scheme` the short name of the scheme, `solver` the name of the solver.
    `proxy_loss` is the error on the calibration inputs relative to the target T,

        tr[(What - T) H (What - T)^T] / tr[T H T^T]

    `true_bits_per_weight` counts everything that is stored but the bias; `n_tokens` tokens were seen, worth
    `n_effective` equally weighted ones; `damp` is the damping that the Hessian needed, relative to its mean
    diagonal; `notes` holds what deviates from the plan, such as a damping that was raised.
    """

    name: str
    scheme: str
    solver: str
    proxy_loss: float
    true_bits_per_weight: float
    n_weights: int
    n_tokens: int
    n_effective: float
    damp: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpochReport:
    """One pass of the learning of a block (`vlmq.learning`).

    `training_loss` is the mean error of the block's output over the pass, `validation_loss` that on the held-out calls
    after it, `start_loss` the same before anything was learned.
    """

    block: str
    epoch: int
    n_epochs: int
    training_loss: float
    validation_loss: float
    start_loss: float
