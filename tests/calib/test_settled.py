"""Replaying what is final in a block: the same packed bytes as without, and forwards really saved."""

from contextlib import nullcontext

import pytest
import tiny_models
import torch
from torch import nn
from walk_oracle import make_batches

import vlmq
from vlmq.calib import block as block_module
from vlmq.calib.settled import Settled, replayed
from vlmq.calib.walk import calls_in_order, layer_inputs, walk_blocks
from vlmq.families import describe

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Two branches, one after the other, and what each of them was run."""

    def __init__(self, is_first_called_twice: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.is_first_called_twice = is_first_called_twice
        self.runs: list[str] = []
        for name in ("first", "second", "third"):
            live = getattr(self, name).forward
            getattr(self, name).forward = lambda x, live=live, name=name: self.runs.append(name) or live(x)

    def forward(self, x):
        x = x + self.first(x)
        if self.is_first_called_twice:
            x = x + self.first(x)
        return x + self.third(x + self.second(x))


def run(module, settled, *, original=False, i=0, reach=(), x=None):
    module.runs.clear()
    with replayed(settled, module, i, original=original, reach=reach, device=CPU), torch.no_grad():
        return module(torch.ones(1, 4) if x is None else x)


def test_the_full_precision_path_runs_each_child_once_but_the_last():
    module, settled = Branches(), Settled()
    expected = run(module, settled, original=True)
    assert module.runs == ["first", "second", "third"]
    assert torch.equal(run(module, settled, original=True), expected)
    assert module.runs == ["third"]
    run(module, settled, original=True, i=1)
    assert module.runs == ["first", "second", "third"]


def test_the_quantized_path_runs_what_may_still_change():
    module, settled = Branches(), Settled()
    run(module, settled, original=True)
    for _ in range(2):
        run(module, settled)
        assert module.runs == ["first", "second", "third"]
    settled.layers.update(["first.0", "first.1"])
    expected = run(module, settled)
    assert torch.equal(run(module, settled), expected)
    assert module.runs == ["second", "third"]


def test_a_child_is_not_final_before_those_called_earlier():
    module, settled = Branches(), Settled()
    run(module, settled, original=True)
    settled.layers.update(["first.0", "second"])
    run(module, settled)
    run(module, settled)
    assert module.runs == ["first", "second", "third"]


def test_a_child_within_reach_is_run():
    module, settled = Branches(), Settled()
    run(module, settled, original=True)
    run(module, settled, original=True, reach=["first.1"])
    assert module.runs == ["first", "third"]


def test_a_child_called_twice_is_never_replayed():
    module, settled = Branches(is_first_called_twice=True), Settled()
    expected = run(module, settled, original=True)
    assert torch.equal(run(module, settled, original=True), expected)
    assert module.runs == ["first", "first", "third"]


def test_a_forward_that_is_stopped_leaves_nothing_wrong_behind():
    module, settled = Branches(), Settled()
    handle = module.second.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(module, settled, original=True)
    handle.remove()
    expected = module(torch.ones(1, 4))
    assert torch.equal(run(module, settled, original=True), expected)
    assert torch.equal(run(module, settled, original=True), expected)


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_packed_bytes_are_the_same_as_without_replaying(family, monkeypatch):
    batches = tiny_models.inputs(family, 2)
    replaying = vlmq.quantize(tiny_models.build(family), batches, "int2-g16").state_dict()
    monkeypatch.setattr(block_module, "replayed", lambda *_, **__: nullcontext())
    plain = vlmq.quantize(tiny_models.build(family), batches, "int2-g16").state_dict()
    assert replaying.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in replaying.items())


def test_attention_is_run_twice_per_call_once_its_layers_are_settled():
    model, batches = tiny_models.build("llama"), make_batches("llama")
    counts = []
    for block in walk_blocks(model, describe(model), batches):
        n_runs = 0

        def count(*_):
            nonlocal n_runs
            n_runs += 1

        group = calls_in_order(block)
        handle = block.module.self_attn.register_forward_pre_hook(count)
        inner = block.module.self_attn.o_proj.register_forward_pre_hook(count)
        for names in group:
            list(layer_inputs(block, names))
            block.settle(names)
        inner.remove()
        handle.remove()
        counts.append(n_runs)
    # Per call: q/k/v stop before o; o; gate and up run the attention to its end; down replays it.
    assert counts == [len(batches) * (1 + 2 + 2 + 1)] * len(counts)
