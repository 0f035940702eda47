"""The record of one quantized layer: one line of the report of a run."""

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
