"""Learning the grids of one block on the error of the block's output; no labels, one block in memory.

After the layers of a block have been solved one by one (`vlmq.block_solving`), their scales and zero points are learned
together, the codes held:

    min over all s, z of the block   sum_t w_t || block(U; s, z)_t - Y_t ||^2 / sum_t w_t

U are the block's inputs on the quantized path, Y what the full-precision block puts out on the full-precision path: the
target is shifted as far as it goes (alpha = 1), so the block also makes up for what the blocks before it have done to
the residual stream. w are the token weights that the saliency gives to the layer called last, which writes the
block's output.

Some calls are held out. After every pass over the others the error on the held-out calls is taken with the grids as
they would be stored; a pass that does not lower it is undone, and the next one takes steps SLOWER times as long. The
start is the first state, so a block never becomes worse on the held-out calls. A loss that is not finite, or that is
DIVERGED times that of the start on the same call, ends the learning of the block; the best state so far is kept and the
layers' reports say so.

Memory on the device beside the block: 16 to 20 n_terms bytes for each of its weights, and what one call needs for a
backward pass.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlmq.calib.block import Block
from vlmq.calib.saliency_tokens import frozen, hooked
from vlmq.calib.tokens import PADDING
from vlmq.calib.trees import first_tensor, load
from vlmq.calib.walk import calls_in_order
from vlmq.report import EpochReport
from vlmq.run import Run
from vlmq.solvers.learned import LearnableGrid, LearnedOptions, parameter_groups
from vlmq.solvers.recipe import learned_options

DIVERGED = 10.0
BETAS = (0.9, 0.95)
SLOWER = 0.25
# Gradients of a mean over all outputs would vanish in float16; Adam does not see the factor.
GRADIENT_SCALE = 1024.0

logger = logging.getLogger(__name__)


def check_learning(run: Run, n_batches: int) -> None:
    """Check, before any work, that a plan that learns can: there is a batch to hold out, and one way to learn a block.

    Raises:
        ValueError: there is one batch only, or layers of one block are to be learned with different options.
    """
    found: dict[str | None, tuple[str, LearnedOptions]] = {}
    for name, scheme in run.plan.in_blocks().items():
        options = learned_options(scheme)
        if options is None:
            continue
        if n_batches < 2:
            raise ValueError(
                "solver 'learned' needs at least 2 calibration batches, one of them to hold out; got "
                f"{n_batches}: give more rows, or smaller batches"
            )
        first, others = found.setdefault(run.plan.layout.linears[name].block, (name, options))
        if others != options:
            raise ValueError(
                f"solver 'learned': the layers of a block are learned together, but {first!r} has {others} and "
                f"{name!r} has {options}; give them the same options"
            )


def learn_block(run: Run, block: Block, weights: dict[str, list[Tensor]]) -> None:
    """Learn the grids of the block's layers whose recipe ends in `learned`, and replace the layers by what was found.

    Args:
        run: the call of `quantize`; it holds the solved layers.
        block: the block, its layers solved.
        weights: per layer and call of the block, (n_tokens,) float32, from the saliency.
    """
    prefix = f"{block.spec.name}."
    chosen = {
        name.removeprefix(prefix): options
        for name, scheme in run.plan.in_blocks().items()
        if name.startswith(prefix) and (options := learned_options(scheme)) is not None
    }
    if not chosen:
        return
    if len(block.inputs) < 2:
        _note(
            run, prefix, list(chosen), "not learned: one call reaches the block, and one has to be held out"
        )
        return
    grids = {name: LearnableGrid(run.packed[prefix + name].quantized_weight()) for name in chosen}
    task = _Task(block, grids, _token_weights(block, weights))
    problem = _learn(run, task, next(iter(chosen.values())))
    for name, grid in grids.items():
        run.requantize(prefix + name, grid.stored())
    block.unsettle()
    if problem is not None:
        logger.warning("%s", problem)
        _note(run, prefix, list(chosen), problem)


def _note(run: Run, prefix: str, names: list[str], text: str) -> None:
    for name in names:
        packed = run.packed[prefix + name]
        assert packed.report is not None
        packed.report = replace(packed.report, notes=(*packed.report.notes, text))


def _token_weights(block: Block, weights: dict[str, list[Tensor]]) -> list[Tensor]:
    """Per call, the weights of the block's output tokens: those of the last layer that has one for each of them."""
    order = [name for group in reversed(calls_in_order(block)) for name in group if name in weights]
    chosen = []
    for i, output in enumerate(block.original_outputs):
        n_tokens = output[..., 0].numel()
        kinds = block.batches[i].flatten()
        fitting = (weights[name][i] for name in order if weights[name][i].numel() == n_tokens)
        s = next(fitting, (kinds != PADDING).float() if len(kinds) == n_tokens else torch.ones(n_tokens))
        chosen.append(s.float().flatten())
    return chosen


@dataclass
class _Task:
    """A block whose layers take their weights from grids, and the error of its output."""

    block: Block
    grids: dict[str, LearnableGrid]
    token_weights: list[Tensor]

    def dense(self) -> dict[str, Tensor]:
        """The weights of the layers by parameter name, in the dtype of the block."""
        module = self.block.module
        return {
            f"{name}.weight": grid().to(module.get_submodule(name).weight.dtype)  # type: ignore[arg-type]
            for name, grid in self.grids.items()
        }

    def loss(self, i: int, dense: dict[str, Tensor]) -> Tensor:
        """Weighted mean squared error of the output of call `i`, a float32 scalar."""
        call, device = self.block.inputs[i], self.block.device
        output = functional_call(self.block.module, dense, load(call.args, device), load(call.kwargs, device))
        error = first_tensor(output).float() - self.block.original_outputs[i].to(device).float()
        s = self.token_weights[i].to(device)
        return (error.flatten(0, -2).square().mean(-1) * s).sum() / s.sum().clamp(min=1e-30)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the parameters of all grids."""
        return {n: {k: t.clone() for k, t in g.state_dict().items()} for n, g in self.grids.items()}

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go back to the parameters of `state`."""
        for name, grid in self.grids.items():
            grid.load_state_dict(state[name])

    @torch.no_grad()
    def losses(self, calls: list[int]) -> list[float]:
        """The error of each call with the grids as they are now."""
        dense = self.dense()
        return [self.loss(i, dense).item() for i in calls]


def _learn(run: Run, task: _Task, options: LearnedOptions) -> str | None:
    """Learn, and leave the best grids in the task; returns what ended the learning early, if anything did."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(run.seed)
    calls = _shuffled([i for i, s in enumerate(task.token_weights) if bool(s.any())], generator)
    n_held_out = min(len(calls) - 1, max(1, round(options.validation_share * len(calls))))
    held_out, training = calls[:n_held_out], calls[n_held_out:]
    problem = None
    with frozen(task.block.module), torch.enable_grad():
        start = dict(zip(training, task.losses(training), strict=True))
        first = best = mean(task.losses(held_out))
        kept = task.state()
        groups = parameter_groups(task.grids.values(), options.lr)
        rates = [group["lr"] for group in groups]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        n_steps, step, pace = options.n_epochs * len(training), 0, 1.0
        for epoch in range(1, options.n_epochs + 1):
            losses: list[float] = []
            for i in _shuffled(training, generator):
                factor = pace * (1 + math.cos(math.pi * step / n_steps)) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = factor * rate
                losses.append(_step(task, i, optimizer))
                step += 1
                if not losses[-1] <= DIVERGED * start[i]:
                    problem = _describe(task, i, step, losses[-1], start[i])
                    break
            if problem is not None:
                break
            found = mean(task.losses(held_out))
            name = task.block.spec.name
            run.progress.epoch(EpochReport(name, epoch, options.n_epochs, mean(losses), found, first))
            if found < best:
                best, kept = found, task.state()
            else:
                task.restore(kept)
                pace *= SLOWER
    task.restore(kept)
    logger.info(
        "%s: learned on %d calls, error on %d held-out calls %.4g -> %.4g, %.1f s",
        *(task.block.spec.name, len(training), n_held_out, first, best, time.perf_counter() - started),
    )
    return problem


def _shuffled(calls: list[int], generator: torch.Generator) -> list[int]:
    return [calls[j] for j in torch.randperm(len(calls), generator=generator).tolist()]


def _step(task: _Task, i: int, optimizer: torch.optim.Optimizer) -> float:
    """One step on call `i`; returns the loss before it. A loss that is not finite changes nothing."""
    loss = task.loss(i, task.dense())
    value = loss.item()
    if math.isfinite(value):
        optimizer.zero_grad()
        (loss * GRADIENT_SCALE).backward()
        optimizer.step()
        for grid in task.grids.values():
            grid.project()
    return value


def _describe(task: _Task, i: int, step: int, loss: float, start: float) -> str:
    """What went wrong in a step, and in which layer it is seen first."""
    seen: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not bool(output.isfinite().all()):
                seen.append(name)

        return hook

    layers = {name: task.block.module.get_submodule(name) for name in task.grids}
    with hooked(*(layer.register_forward_hook(look(name)) for name, layer in layers.items())):
        task.losses([i])
    where = (
        f"the output of layer {seen[0]!r} is not finite" if seen else "the outputs of all layers are finite"
    )
    return (
        f"{task.block.spec.name}: learning stopped at step {step}, loss {loss:.4g} against {start:.4g} at the start "
        f"({where}); the best state before it is kept; try a smaller lr"
    )
