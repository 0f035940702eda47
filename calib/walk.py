"""Walks the blocks of a model in the order in which its forward runs them, on two paths.

The quantized path sees what the already quantized blocks put out, the full-precision path what the untouched
ones did; as long as nothing has been changed they are one. Both go through the model's own forward
(`replay`). A vision tower is stored as a whole when its blocks are done, so that a block of the language
model never runs it again.

Memory: per batch and path the arguments and the output of one block, plus those outputs that later blocks read
(`trace`), all in CPU memory; what is both output and argument is held once. The full-precision copy of a block shares
its parameters. Cost: linear in the number of blocks, each block runs once per batch and path.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.calib.block import Block, BlockCall, hidden_states
from vlmq.calib.forwards import run_with_writes
from vlmq.calib.layer_inputs import calls_in_order, layer_inputs
from vlmq.calib.replay import Outputs, Replay, calibration_mode
from vlmq.calib.tokens import IMAGE, TEXT, CalibBatch
from vlmq.calib.trace import Trace, signature, trace, walk_order
from vlmq.calib.trees import first_tensor, known_leaves, leaves, load, offload, share
from vlmq.families import PARTS, BlockSpec, Layout

__all__ = ["Block", "BlockCall", "calls_in_order", "layer_inputs", "walk_blocks"]


def walk_blocks(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[CalibBatch],
    *,
    device: torch.device | str | None = None,
    parts: Collection[str] | None = None,
    names: Collection[str] | None = None,
) -> Iterator[Block]:
    """Yield the blocks one by one; the consumer may replace linear layers before it asks for the next.

    It replaces modules or parameters, and never writes to a parameter: the full-precision copy has the same.

    Args:
        model: on one device. Training flags and configs are restored at the end, also after an error;
            forwards are only replaced while the walk itself runs, never while the consumer does.
        layout: from `describe(model)`.
        batches: calibration batches.
        device: where a block runs while it is worked on; None is the model's device.
        parts: parts to walk; None is all but the projector.
        names: blocks to walk, instead of `parts`.

    Raises:
        ValueError: no batches, unknown parts or names, or a block that no batch reaches.
    """
    blocks = _select(layout, parts, names)
    batches = list(batches)
    if not batches:
        raise ValueError("the calibration set is empty: expected at least one batch of model inputs")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "model: expected weights in memory, got parameters on the meta device; load the model first"
        )
    return _Walk(model, layout, batches, blocks, device).blocks()


def _select(
    layout: Layout, parts: Collection[str] | None, names: Collection[str] | None
) -> dict[str, BlockSpec]:
    known = {block.name for block in layout.blocks}
    unknown = sorted(set(parts or ()) - set(PARTS)) + sorted(set(names or ()) - known)
    if unknown:
        raise ValueError(
            f"{' '.join(map(repr, unknown))} is no part and no block of this model; "
            f"parts: {' '.join(PARTS)}; blocks: {' '.join(sorted(known))}"
        )
    if names is None:
        chosen = set(PARTS) - {"projector"} if parts is None else set(parts)
        names = {block.name for block in layout.blocks if block.part in chosen}
    blocks = {block.name: block for block in layout.blocks if block.name in names}
    if not blocks:
        present = sorted({block.part for block in layout.blocks})
        raise ValueError(
            f"no block to walk: parts {parts} of a model whose blocks are of {' '.join(present)}"
        )
    return blocks


class _Walk:
    """The state of one walk: the trace, the outputs stored so far, and whether the paths have parted."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        batches: list[CalibBatch],
        selected: dict[str, BlockSpec],
        device: torch.device | str | None,
    ) -> None:
        self.model = model
        self.selected = selected
        self.towers = [tower.name for tower in layout.towers]
        self.replay = Replay(model, batches)
        self.device = self.replay.home if device is None else torch.device(device)
        self.signatures = [signature(batch.inputs) for batch in batches]
        self.has_parted = False

    def blocks(self) -> Iterator[Block]:
        """Go through the steps: open and close each block, seal each tower, drop what is no longer read."""
        with calibration_mode(self.model):
            traced = self._trace()
            steps = walk_order(traced.order, self.selected)
            last_read = _last_read(traced, steps)
            for step, name in enumerate(steps):
                n_calls = {i: traced.n_calls[kind].get(name, 0) for i, kind in enumerate(self.signatures)}
                n_calls = {i: n for i, n in n_calls.items() if n}
                if name in self.selected:
                    block = self._open(name, n_calls)
                    yield block
                    self._close(block, n_calls)
                    del block
                else:
                    self._seal(name, n_calls)
                for maker in self.replay.outputs["original"]:
                    reads = last_read.get(maker, {})
                    if maker == name or step in reads.values():
                        self.replay.keep(maker, {number for number, last in reads.items() if last > step})

    def _trace(self) -> Trace:
        modules = {name: self.model.get_submodule(name) for name in self.selected}
        towers = {name: self.model.get_submodule(name) for name in self.towers}
        traced = trace(self.replay.forward, self.signatures, modules, towers)
        missing = [name for name in self.selected if name not in traced.order]
        if missing:
            kinds = "; ".join(sorted({" ".join(kind) for kind in traced.n_calls}))
            raise ValueError(
                f"no batch reaches {len(missing)} of {len(self.selected)} blocks, first {missing[0]!r}; the "
                f"batches have the inputs: {kinds}. Add samples that use this part, such as images, or leave "
                "it out"
            )
        return traced

    def _open(self, name: str, n_calls: dict[int, int]) -> Block:
        """Capture the inputs of both paths and compute the full-precision outputs, before any change."""
        calls, outputs = self._capture(name, n_calls, "original")
        quantized = calls
        if self.has_parted:
            parted, _ = self._capture(name, n_calls, "quantized")
            quantized = {i: _share_calls(parted[i], calls[i]) for i in calls}
        module = self.model.get_submodule(name).to(self.device)
        spec = self.selected[name]
        block = Block(
            spec=spec,
            module=module,
            original=copy.deepcopy(module, {id(p): p for p in module.parameters()}),
            inputs=[call for i in calls for call in quantized[i]],
            original_inputs=[call for i in calls for call in calls[i]],
            original_outputs=[],
            batches=[_kinds(spec, call, self.replay.batches[i].kinds) for i in calls for call in calls[i]],
            batch_indices=[i for i in calls for _ in calls[i]],
            device=self.device,
        )
        for number, i in enumerate(block.batch_indices):
            if n_calls[i] == 1:
                outputs[i] = [self._run(block, number, original=True)]
        self.replay.outputs["original"][name] = outputs
        block.original_outputs += [first_tensor(tree) for i in calls for tree in outputs[i]]
        return block

    def _close(self, block: Block, n_calls: dict[int, int]) -> None:
        """Store what the block, as the consumer left it, puts out on the quantized path."""
        name = block.spec.name
        original = self.replay.outputs["original"][name]
        is_same = _same_weights(block.module, block.original)
        if is_same and all(a is b for a, b in zip(block.inputs, block.original_inputs, strict=True)):
            self.replay.outputs["quantized"][name] = original
            block.module.to(self.replay.home)
            return
        quantized: Outputs = {}
        for number, i in enumerate(block.batch_indices):
            if n_calls[i] == 1:
                is_equal = is_same and block.inputs[number] is block.original_inputs[number]
                quantized[i] = original[i] if is_equal else [self._run(block, number, original=False)]
        block.module.to(self.replay.home)
        for i in original:
            if n_calls[i] > 1:
                quantized[i] = self.replay.record(name, i, n_calls[i], "quantized")
        self._store_quantized(name, quantized)

    def _seal(self, name: str, n_calls: dict[int, int]) -> None:
        """Store the output of a tower on both paths; its blocks are never run or read again."""
        original = {i: self.replay.record(name, i, n, "original") for i, n in n_calls.items()}
        quantized = original
        if self.has_parted:
            quantized = {i: self.replay.record(name, i, n, "quantized") for i, n in n_calls.items()}
        self.replay.forget([n for n in self.replay.outputs["original"] if n.startswith(f"{name}.")])
        self.replay.outputs["original"][name] = original
        self._store_quantized(name, quantized)

    def _store_quantized(self, name: str, quantized: Outputs) -> None:
        """Store outputs of the quantized path; tensors that equal the original's are kept once."""
        original = self.replay.outputs["original"][name]
        if quantized is not original:
            for i, trees in quantized.items():
                quantized[i] = [share(a, b) for a, b in zip(trees, original[i], strict=True)]
            self.has_parted |= any(
                a is not b for i in quantized for a, b in zip(quantized[i], original[i], strict=True)
            )
        self.replay.outputs["quantized"][name] = quantized

    def _capture(
        self, name: str, n_calls: dict[int, int], path: str
    ) -> tuple[dict[int, list[BlockCall]], Outputs]:
        """The calls of a block, and its outputs if it was run.

        A tensor that is stored already, as an output of the block before or as an argument in the batch before (masks,
        positions), is held once.
        """
        captured: dict[int, list[BlockCall]] = {}
        outputs: Outputs = {}
        last: list[Any] = []
        for i, n in n_calls.items():
            calls, outputs[i] = self.replay.capture(name, i, n, path)
            known = [*self.replay.stored(path, i), *last]
            captured[i] = [BlockCall(*known_leaves((call.args, call.kwargs), known)) for call in calls]
            last = list(leaves([(call.args, call.kwargs) for call in captured[i]]))
        return captured, outputs

    def _run(self, block: Block, i: int, *, original: bool) -> object:
        module, calls = (block.original, block.original_inputs) if original else (block.module, block.inputs)
        with torch.no_grad(), block.replaying(i, original=original):
            args, kwargs = load((calls[i].args, calls[i].kwargs), self.device)
            return offload(run_with_writes(module, args, kwargs))


def _last_read(traced: Trace, steps: list[str]) -> dict[str, dict[int, int]]:
    """Module -> number of its output tensor -> the last step that reads it."""
    last: dict[str, dict[int, int]] = {}
    for (maker, number), readers in traced.readers.items():
        last.setdefault(maker, {})[number] = max((steps.index(r) for r in readers if r in steps), default=-1)
    return last


def _share_calls(calls: list[BlockCall], originals: list[BlockCall]) -> list[BlockCall]:
    """The original call itself where the quantized path has equal arguments."""
    shared = []
    for call, original in zip(calls, originals, strict=True):
        mine, theirs = (call.args, call.kwargs), (original.args, original.kwargs)
        merged = share(mine, theirs)
        shared.append(original if merged is theirs else BlockCall(*merged))
    return shared


def _same_weights(module: nn.Module, original: nn.Module) -> bool:
    mine = [(name, type(m)) for name, m in module.named_modules()]
    if mine != [(name, type(m)) for name, m in original.named_modules()]:
        return False
    tensors = [dict((*m.named_parameters(), *m.named_buffers())) for m in (module, original)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()
    )


def _kinds(spec: BlockSpec, call: BlockCall, kinds: Tensor) -> Tensor:
    """Kinds of the tokens of a block's hidden states, (rows, n_tokens) int8.

    A language or text block whose hidden states have the batch's rows and tokens has the batch's kinds.
    Hidden states of the vision part are image throughout; any other layout counts as text without padding.
    """
    hidden = hidden_states(call)
    if hidden is None:
        return kinds
    if spec.part in ("language", "text") and hidden.shape[:-1] == kinds.shape:
        return kinds
    kind = IMAGE if spec.part in ("vision", "projector") else TEXT
    rows = hidden.shape[0] if hidden.ndim > 2 else 1
    return torch.full((rows, hidden[..., 0].numel() // rows), kind, dtype=torch.int8)
