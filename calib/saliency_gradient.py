"""Saliencies from gradients: of the attention block's output error, of the model's loss, of the loss per modality.

block_grad (VLMQ, arXiv 2508.03351): with the full-precision inputs F and the quantized path's inputs U of a block,

    L = ||Attn(F) - Attn(U)||_F^2,  Attn(X) = X + MHSA(norm(X)),  P = dL/dZ,  g_n = mean_c |P_nc|,  s_n = g_n^2

for the output Z of each linear layer of the attention, which so has weights of its own. Both sides run with the
block's full-precision weights. Linear layers outside the attention have uniform weights, and so have all layers
where both paths are still equal (the first block): there the loss and its gradient are exactly zero.

loss_grad takes s_n = mean_c (dLoss/dZ_nc)^2, the token diagonal of the Fisher matrix at the layer's output; modality
takes 1 for text and answer tokens and one ratio of gradients for image tokens. Both are computed beforehand for the
whole model, see `vlmq.calib.loss_gradient`.
"""

import torch
from torch import Tensor

from vlmq.calib.block import Block, BlockCall
from vlmq.calib.saliency import SaliencyContext
from vlmq.calib.saliency_residual import (
    ResidualPoint,
    attention_modules,
    attention_of,
    find_residual_point,
    residual_stream,
)
from vlmq.calib.saliency_tokens import finish, frozen, linear_kinds, ones
from vlmq.calib.tokens import IMAGE

# Below this relative error the paths differ by rounding noise only, whose gradient says nothing.
NOISE = 1e-7


def block_grad(block: Block, context: SaliencyContext) -> dict[str, list[Tensor]]:
    """VLMQ's saliency: squared mean gradient of the residual attention module's output error, see the module.

    At the peak the graph of one call of the attention module is on the device beside the block and its copy.
    """
    raw = ones(block)
    for attention in attention_modules(block.original):
        layers = [name for name in raw if attention_of(name, {attention: block.original})]
        if not layers:
            continue
        point: ResidualPoint | None = None
        for i, (call, original_call) in enumerate(zip(block.inputs, block.original_inputs, strict=True)):
            if call is original_call:
                continue
            point = point or find_residual_point(block, attention, call)
            for name, scores in _squared_gradients(
                block, attention, point, call, original_call, layers
            ).items():
                if scores.numel() == raw[name][i].numel():
                    raw[name][i] = scores
    return finish(block, context, raw, saliency="block_grad")


def _squared_gradients(
    block: Block,
    attention: str,
    point: ResidualPoint,
    call: BlockCall,
    original_call: BlockCall,
    layers: list[str],
) -> dict[str, Tensor]:
    """Layer -> s = g^2 (n_tokens,) float32 in a common scale; no entry where the paths do not differ."""
    with torch.no_grad():
        reference, _ = residual_stream(block, attention, point, original_call, [])
    with frozen(block.original), torch.enable_grad():
        stream, outputs = residual_stream(block, attention, point, call, layers)
        error = stream.float() - reference.float()
        if float(error.detach().norm()) <= NOISE * float(reference.float().norm()):
            return {}
        loss = error.square().sum()
        if not loss.requires_grad:
            return {}
        gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    means = {
        name: gradient.float().abs().mean(dim=-1).flatten()
        for name, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None
    }
    return {
        name: (g / g.amax().clamp(min=torch.finfo(g.dtype).tiny)).square().cpu() for name, g in means.items()
    }


def loss_grad(block: Block, context: SaliencyContext) -> dict[str, list[Tensor]]:
    """Mean squared gradient of the model's loss at each layer's output; see `vlmq.calib.loss_gradient`."""
    if context.loss_weights is None:
        raise ValueError(
            "saliency 'loss_grad' needs the gradients of the loss; make the context by "
            "prepare('loss_grad', model, layout, batches) before the first block is quantized"
        )
    raw: dict[str, list[Tensor]] = {}
    for name in block.linears():
        full_name = f"{block.spec.name}.{name}"
        weights = context.loss_weights.get(full_name)
        if weights is None or len(weights) != len(block.inputs):
            raise ValueError(
                f"saliency 'loss_grad': layer {full_name!r} has {len(block.inputs)} calls but gradients for "
                f"{0 if weights is None else len(weights)}; call prepare with the model and the batches that are walked"
            )
        raw[name] = weights
    return finish(block, context, raw, saliency="loss_grad")


def modality(block: Block, context: SaliencyContext) -> dict[str, list[Tensor]]:
    """MBQ's balance (arXiv 2412.19509): 1 for text and answer tokens, rho for image tokens.

    rho is mean |dLoss/dY| over image tokens by the same over answer tokens (text tokens where there are none), with
    Y the output of the block's attention for the layers in it, and of its MLP for the others; it is at least the
    median of rho over the blocks of that part. MBQ uses rho to choose AWQ's scales; here it weights the squared error
    (their MSE variant, counted by token). Blocks that see one kind only (towers) have uniform weights.
    """
    if context.image_ratios is None:
        raise ValueError(
            "saliency 'modality' needs the gradients of the loss; make the context by "
            "prepare('modality', model, layout, batches) before the first block is quantized"
        )
    raw = ones(block)
    for name, calls in raw.items():
        ratio = context.image_ratios.get(f"{block.spec.name}.{name}", 1.0)
        for i, scores in enumerate(calls):
            kinds = linear_kinds(block, i, scores.numel()).flatten()
            calls[i] = torch.where(kinds == IMAGE, ratio, scores)
    return finish(block, context, raw, saliency="modality", clip=1.0)
