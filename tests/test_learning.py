"""Learning the grids of a block: never worse on what was held out, stopped where it diverges, packed like any other."""

import math

import pytest
import tiny_models
import torch

import vlmq
from vlmq import learning, quantization
from vlmq.formats import FORMATS
from vlmq.linear import QuantLinear
from vlmq.progress import SilentProgress
from vlmq.solvers.learned import LearnableGrid


class Losses(SilentProgress):
    def __init__(self):
        self.epochs = []

    def epoch(self, report):
        self.epochs.append(report)


def packed(model) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def learned(scheme="int2-g16", solver="learned", *, family="llama", n_batches=4, **arguments):
    """A tiny model, quantized, and the reports of the passes."""
    model, losses = tiny_models.build(family), Losses()
    batches = tiny_models.inputs(family, n_batches)
    vlmq.quantize(model, batches, scheme, solver=solver, progress=losses, **arguments)
    return model, losses.epochs


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_learns_keeps_its_codes_and_reloads(format, tmp_path):
    options = {"n_epochs": 1, "lr": 0.002}
    model, epochs = learned(f"{format}-g16", options=options)
    plain, _ = learned(f"{format}-g16", None)
    assert [e.block for e in epochs] == ["model.layers.0", "model.layers.1"]
    changed = 0
    for name, layer in packed(model).items():
        start, found = packed(plain)[name].quantized_weight(), layer.quantized_weight()
        if ".layers.0." in name:
            assert torch.equal(found.codes, start.codes)
            changed += not torch.equal(found.scales, start.scales)
        assert layer.report.solver.endswith("+learned")
    assert changed or not epochs[0].validation_loss < epochs[0].start_loss
    vlmq.save(model, tmp_path / "packed")
    batch = tiny_models.inputs("llama", 1)[0]
    assert torch.equal(logits(vlmq.load(tmp_path / "packed"), batch), logits(model, batch))


@pytest.mark.parametrize("scheme", ["int2-channel", "ternary-g32", "binary-g16"])
def test_learning_lowers_the_error_of_what_was_held_out(scheme):
    _, epochs = learned(scheme, "rtn+learned", n_batches=24, options={"n_epochs": 3, "lr": 0.05})
    first = [e for e in epochs if e.block == "model.layers.0"]
    assert [e.epoch for e in first] == [1, 2, 3]
    assert first[-1].validation_loss < 0.985 * first[0].start_loss


@pytest.mark.parametrize("lr", [0.02, 0.03])
def test_a_block_is_never_worse_than_its_start_on_what_was_held_out(lr, monkeypatch):
    seen = []
    original = learning._learn

    def watched(run, task, options):
        start = task.losses(list(range(len(task.token_weights))))
        problem = original(run, task, options)
        seen.append((start, task.losses(list(range(len(task.token_weights))))))
        return problem

    monkeypatch.setattr(learning, "_learn", watched)
    _, epochs = learned(n_batches=3, options={"lr": lr, "validation_share": 0.34})
    assert len(seen) == 2
    generator = torch.Generator().manual_seed(0)
    held_out = torch.randperm(3, generator=generator).tolist()[0]
    for start, end in seen:
        assert end[held_out] <= start[held_out]
    assert len(epochs) == 8


def test_the_next_block_sees_what_the_learned_one_puts_out(monkeypatch):
    """What was stored of the block before it was learned must not be replayed."""
    inputs = {}

    def watched(run, block, weights):
        inputs[block.spec.name] = [call.args[0] for call in block.inputs]
        quantize_block(run, block, weights)

    quantize_block = quantization.quantize_block
    monkeypatch.setattr(quantization, "quantize_block", watched)
    model, epochs = learned(solver="rtn+learned", n_batches=8, options={"lr": 0.05})
    assert epochs[0].start_loss > min(e.validation_loss for e in epochs[:4])
    for name, layer in packed(model).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.dequantize()
        model.set_submodule(name, dense)
    found = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for batch in tiny_models.inputs("llama", 8):
        logits(model, batch)
    torch.testing.assert_close(torch.cat(found), torch.cat(inputs["model.layers.1"]))


def test_same_seed_gives_the_same_bytes_and_another_seed_others():
    given = {"solver": "rtn+learned", "n_batches": 8, "options": {"lr": 0.05}}
    states = [learned(seed=seed, **given)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_loss_that_is_not_finite_stops_and_names_layer_and_step(monkeypatch):
    forward, calls = LearnableGrid.forward, []

    def broken(grid):
        weight = forward(grid)
        if grid.start.codes.shape == (64, 96):  # down_proj
            calls.append(1)
            if len(calls) > 4:
                weight = weight * math.nan
        return weight

    monkeypatch.setattr(LearnableGrid, "forward", broken)
    model, _ = learned()
    plain, _ = learned(solver=None)
    layer = packed(model)["model.layers.0.mlp.down_proj"]
    assert "learning stopped at step 3, loss nan" in layer.report.notes[-1]
    assert "the output of layer 'mlp.down_proj' is not finite" in layer.report.notes[-1]
    assert torch.equal(layer.scales, packed(plain)["model.layers.0.mlp.down_proj"].scales)
    assert all(torch.isfinite(layer.dequantize()).all() for layer in packed(model).values())


def test_a_diverging_loss_stops_and_keeps_the_start():
    model, epochs = learned("int4-g16", options={"lr": 1000.0})
    plain, _ = learned("int4-g16", None)
    assert epochs == []
    for name, layer in packed(model).items():
        assert "learning stopped at step 2" in layer.report.notes[-1]
        assert torch.equal(layer.scales, packed(plain)[name].scales)


def test_only_the_layers_whose_recipe_says_so_are_learned():
    overrides = {"*.mlp.*": vlmq.scheme.Scheme(vlmq.scheme.get_format("int4"), 16, "rtn")}
    model, epochs = learned(solver="rtn+learned", n_batches=8, overrides=overrides)
    plain, _ = learned(solver="rtn", n_batches=8, overrides=overrides)
    assert epochs
    same = {name for name, m in packed(model).items() if torch.equal(m.scales, packed(plain)[name].scales)}
    assert all(".mlp." in name or ".layers.1." in name for name in same)
    assert sum(".layers.0.mlp." in name for name in same) == 3


@pytest.mark.parametrize("family", ["llava", "clip", "qwen3_vl_moe"])
def test_other_families_learn(family):
    model, epochs = learned(family=family, n_batches=3, options={"n_epochs": 1})
    layout = vlmq.plan(tiny_models.build(family), "int2-g16").layout
    assert {e.block for e in epochs} == {layout.linears[name].block for name in packed(model)}


def test_a_block_that_a_single_call_reaches_is_left_as_solved_and_says_so():
    batches = tiny_models.inputs("llava", 1)
    text = {
        "input_ids": torch.randint(3, 190, (1, 12)),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
    }
    model, losses = tiny_models.build("llava"), Losses()
    vlmq.quantize(model, [*batches, text], "int2-g16", solver="learned", progress=losses)
    assert {e.block for e in losses.epochs} == {f"model.language_model.layers.{i}" for i in range(2)}
    notes = {name: layer.report.notes for name, layer in packed(model).items()}
    assert all(("not learned" in " ".join(n)) == ("vision" in name) for name, n in notes.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"n_epoch": 2}}, "takes no n_epoch; known: act_order damp lr n_epochs"),
        ({"options": {"n_epochs": 0}}, "expected n_epochs >= 1"),
        ({"options": {"lr": 0.0}}, "lr > 0"),
        ({"options": {"validation_share": 1.5}}, "validation_share between 0 and 1"),
        ({"solver": "learned+cd"}, "can only come last"),
        ({"solver": "nosuch+learned"}, "'nosuch' is unknown"),
    ],
)
def test_wrong_settings_are_refused_by_the_plan(arguments, message):
    with pytest.raises(ValueError, match=message):
        vlmq.plan(tiny_models.build("llama"), "int4-g16", **{"solver": "learned", **arguments})


def test_a_single_batch_and_mixed_options_are_refused_before_any_work():
    with pytest.raises(ValueError, match="at least 2 calibration batches, one of them to hold out; got 1"):
        learned(n_batches=1)
    scheme = vlmq.scheme.Scheme(vlmq.scheme.get_format("int4"), 16, "learned", {"n_epochs": 2})
    with pytest.raises(ValueError, match="layers of a block are learned together"):
        learned(overrides={"*.down_proj": scheme})
