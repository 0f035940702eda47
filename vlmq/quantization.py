"""quantize: from a full-precision model and calibration data to packed layers, block by block.

For each block, in the order of execution, with its inputs on the full-precision path F and on the quantized
path U:

1. the saliency gives each token of each layer a weight s;
2. layers are taken in the order of their calls (q/k/v, then o, then gate/up, then down), each seeing the inputs that
   the layers quantized before it produce;
3. H = U S U^T and D = (F - U) S U^T are gathered, the target is T = W + alpha W D H^-1; for a layer whose output is
   added to the residual stream, the drift of the stream itself takes the place of W D (`vlmq.calib.drift`);
4. the solver finds the codes, and the layer is replaced;
5. fused experts follow, one by one, each with the tokens that the router sends to it (`vlmq.expert_solving`);
6. where the recipe ends in `learned`, the grids of the block are learned on the error of its output
   (`vlmq.learning`).

Layers that share inputs and token weights share H and are solved as one matrix, row under row. With a folder for it,
each finished block is written there, and a call that was interrupted goes on after the last one (`vlmq.resuming`).

Memory at the peak, beside the model, whose original layers stay until the end since a failure puts them back: the
packed layers so far; stand-ins of one block's layers; for each calibration token five hidden states (input and
attention output of the block on both paths, output on one; in CPU memory); and for the largest group of layers of one
input 22 bytes for each weight of its matrix, or two matrices of (in_features, in_features) float32 and 14. Where blocks
are computed on a GPU, the originals of finished blocks wait in CPU memory.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.attach import attach, earlier_quantizer, origin
from vlmq.block_solving import quantize_block
from vlmq.calib.batches import as_batches
from vlmq.calib.block import Block
from vlmq.calib.saliency import SALIENCIES, prepare, read_options
from vlmq.calib.tokens import CalibBatch
from vlmq.calib.walk import walk_blocks
from vlmq.embedding import find_embedding, pack_embedding
from vlmq.expert_solving import quantize_experts
from vlmq.learning import check_learning, learn_block
from vlmq.planning import EMBEDDING_SOLVER, plan
from vlmq.progress import Progress, SilentProgress
from vlmq.resuming import FinishedBlocks, what_decides
from vlmq.run import Run
from vlmq.scheme import Scheme, parse_scheme

DEFAULT_ALPHA = 0.5
DEFAULT_SALIENCY = "uniform"


def quantize(
    model: PreTrainedModel,
    calib_data: Any,
    scheme: str | Scheme = "int4-g128",
    *,
    solver: str | None = None,
    saliency: str = DEFAULT_SALIENCY,
    saliency_options: Mapping[str, Any] | None = None,
    alpha: float = DEFAULT_ALPHA,
    overrides: Mapping[str, str | Scheme | None] | str | None = None,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Scheme | None = None,
    device: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantize a model in place, after training, and return it.

    The model keeps its class and its forward; its linear layers become `QuantLinear`.
    `model.save_pretrained` and `from_pretrained` work as before. If anything fails, the model is put back
    as it was.

    Args:
        model: any transformers model: image-text-to-text, dual encoder or language model.
        calib_data: a CalibrationSet of `vlmq.calib.load`, or batches of model inputs, or token ids.
        scheme: format and group size, such as "int4-g128", "int2-g64", "ternary-channel".
        solver: a recipe such as "gptq+cd", or "learned": the default of each format, then its grids learned block
            by block; None takes the default of each format.
        saliency: how tokens are weighted, a name of `vlmq.calib.saliency.SALIENCIES`.
        saliency_options: options of the saliency, see `vlmq.calib.saliency.read_options`.
        alpha: strength of the asymmetric target, 0 (plain) to 1 (full least squares towards the original's
            outputs).
        overrides: part ("vision", "projector", "language", "text"), half ("attention", "ffn") or pattern over layer
            names -> scheme, or None to keep those layers; or a preset, "Q-FFN" or "Q-ALL".
        options: options of the solver, such as {"damp": 0.05}.
        embeddings: scheme of the token embedding and the output head, such as "int8-g64", rounded to nearest after
            all else; one packed matrix serves both where they are tied. None keeps them.
        device: where blocks are computed; None is where the model is.
        checkpoint_dir: where finished blocks are written; a call with the same arguments goes on after them.
        seed: seed of everything random; the same seed on the same machine gives the same packed bytes.
        progress: told about every layer; None is silent.

    Raises:
        ValueError: a name, shape, option or calibration row is wrong, or the checkpoint_dir is of another run, before
            any work starts.
        RuntimeError: inputs that are not finite, a layer that no token reached, a hessian that cannot be
            factored.
    """
    check_alpha(alpha)
    labels, post = read_options(saliency, saliency_options)
    recipe = plan(model, scheme, solver=solver, overrides=overrides, options=options, embeddings=embeddings)
    batches = as_batches(calib_data, model)
    run = Run(model, recipe, alpha, seed, progress or SilentProgress())
    check_learning(run, len(batches))
    settings = {"saliency": saliency, "saliency_options": dict(saliency_options or {})}
    settings |= {"alpha": alpha, "seed": seed}
    finished = None
    if checkpoint_dir is not None:
        finished = FinishedBlocks(Path(checkpoint_dir), run, what_decides(run, batches, device, settings))
    with finished or nullcontext():
        context = prepare(saliency, model, recipe.layout, batches, labels=labels, post=post, seed=seed)
        _walk_and_pack(run, batches, device, lambda block: SALIENCIES[saliency](block, context), finished)
    attach(
        model,
        {name: scheme.name for name, scheme in recipe.schemes.items()},
        {
            "solver": sorted({str(s.solver) for s in recipe.schemes.values()}),
            "options": dict(options or {}),
            **settings,
            "calibration": getattr(calib_data, "hash", None),
            "calibration_set": getattr(calib_data, "description", None),
            **origin(model),
        },
        embeddings=None if recipe.embedding is None else recipe.embedding.looked_up(),
    )
    return model


def pack_embeddings(model: PreTrainedModel, scheme: str | Scheme = "int8-g64") -> PreTrainedModel:
    """Pack the token embedding and the output head of a model, packed or not, in place; nothing is calibrated.

    What `quantize(..., embeddings=scheme)` does last.

    Args:
        model: a model whose token embedding is an nn.Embedding.
        scheme: format and group size.

    Raises:
        ValueError: the embedding or the head cannot be packed, or is packed already; an unknown scheme.
    """
    found, given = find_embedding(model), parse_scheme(scheme, where="embeddings")
    earlier_quantizer(model)
    pack_embedding(model, found, given)
    attach(
        model,
        dict.fromkeys(found.layers(), given.name),
        {"solver": [EMBEDDING_SOLVER]},
        embeddings=found.looked_up(),
    )
    return model


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless the strength of the asymmetric target is between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")


def _walk_and_pack(
    run: Run,
    batches: list[CalibBatch],
    device: torch.device | str | None,
    weigh: Callable[[Block], dict[str, list[Tensor]]],
    finished: FinishedBlocks | None,
) -> None:
    """Quantize block by block, then pack what is left; whatever fails, the model is put back as it was."""
    run.progress.start(len(run.blocks()), len(run.plan.in_blocks()))
    embedding = run.plan.embedding
    is_done = False
    try:
        run.unfuse()
        with torch.no_grad():
            for block in _walk(run, batches, device):
                if finished is None or not finished.put_back(block.spec.name):
                    weights = weigh(block)
                    quantize_block(run, block, weights)
                    quantize_experts(run, block, weights)
                    learn_block(run, block, weights)
                    if finished is not None:
                        finished.keep(block.spec.name)
                del block  # and its activations, before the next one is opened
        run.pack()
        if embedding is not None:
            pack_embedding(run.model, embedding, run.plan.schemes[embedding.source()])
        is_done = True
    finally:
        if not is_done:
            run.restore()
        run.progress.finish()


def _walk(run: Run, batches: list[CalibBatch], device: torch.device | str | None) -> Iterator[Block]:
    """Blocks of the plan in order; a block's dense stand-ins give way to packed layers once it has been left."""
    wanted = run.blocks()
    previous: str | None = None
    for block in walk_blocks(run.model, run.plan.layout, batches, device=device, names=wanted):
        if previous is not None:
            run.pack(f"{previous}.")
        previous = block.spec.name
        yield block
        del block
