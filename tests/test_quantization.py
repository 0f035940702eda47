"""quantize end to end on every family: packed, saved, reloaded, the same logits; and what happens to wrong input."""

import pytest
import tiny_models
import torch

import vlmq
from vlmq import quantization
from vlmq.linear import QuantLinear

FAMILIES = list(tiny_models.FAMILIES)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output["logits_per_image"] if "logits_per_image" in output else output["logits"]


def packed(model) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_reload_keeps_the_logits(family, tmp_path):
    model, batches = tiny_models.build(family, torch.bfloat16), tiny_models.inputs(family, 2)
    before = logits(model, batches[0])
    vlmq.quantize(model, batches, "int4-g16")
    after = logits(model, batches[0])
    assert not torch.equal(before, after)
    assert (after - before).float().norm() < 0.3 * before.float().norm()
    vlmq.save(model, tmp_path / "packed")
    reloaded = vlmq.load(tmp_path / "packed")
    assert torch.equal(logits(reloaded, batches[0]), after)
    assert packed(reloaded).keys() == packed(model).keys()


@pytest.mark.parametrize("family", ["llava", "clip", "llama"])
def test_all_that_the_plan_names_is_packed_and_nothing_else(family):
    model, batches = tiny_models.build(family), tiny_models.inputs(family, 2)
    plan = vlmq.plan(model, "ternary-g32")
    assert "true bits" in str(plan)
    assert plan.n_bytes_after < plan.n_bytes_before
    vlmq.quantize(model, batches, "ternary-g32")
    assert packed(model).keys() == plan.schemes.keys()
    for name, layer in packed(model).items():
        assert layer.report is not None
        assert layer.report.name == name
        assert 0 < layer.report.proxy_loss < 1
        assert layer.report.true_bits_per_weight * layer.report.n_weights == plan.bits[name]


def test_overrides_take_parts_and_patterns_and_the_last_decides():
    model = tiny_models.build("llava")
    overrides = {
        "vision": None,
        "projector": "int8-g16",
        "*.down_proj": "int3-g16",
        "*.layers.0.mlp.down_proj": None,
    }
    plan = vlmq.plan(model, "int2-g32", overrides=overrides)
    parts = {plan.layout.linears[name].part for name in plan.schemes}
    assert parts == {"projector", "language"}
    down = {name: s.name for name, s in plan.schemes.items() if name.endswith("down_proj")}
    assert set(down.values()) == {"int3-g16"}
    assert len(down) == 1
    vlmq.quantize(model, tiny_models.inputs("llava", 1), "int2-g32", overrides=overrides)
    assert packed(model).keys() == plan.schemes.keys()


def test_same_seed_gives_the_same_bytes():
    states = []
    for _ in range(2):
        model = tiny_models.build("llava")
        vlmq.quantize(model, tiny_models.inputs("llava", 2), "int2-g16", seed=7)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_calibration_lowers_the_error_of_the_outputs():
    """Feedback with the drift corrected is nearer to the original than rounding to nearest, on the same data."""
    errors = {}
    for solver, alpha in (("rtn", 0.0), ("gptq+cd", 0.0), ("gptq+cd", 1.0)):
        model, batches = tiny_models.build("llama"), tiny_models.inputs("llama", 8)
        before = [logits(model, batch) for batch in batches]
        vlmq.quantize(model, batches, "int2-g16", solver=solver, alpha=alpha)
        difference = [logits(model, batch) - b for batch, b in zip(batches, before, strict=True)]
        errors[solver, alpha] = torch.cat(difference, 1).norm().item()
    assert errors["gptq+cd", 0.0] < errors["rtn", 0.0]
    assert errors["gptq+cd", 1.0] < errors["gptq+cd", 0.0]


def test_a_failure_puts_the_model_back(monkeypatch):
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]

    class Failing:
        n = 0

        def start(self, n_blocks, n_layers):
            assert n_blocks == 4

        def layer(self, report, block_name):
            self.n += 1
            if self.n == 15:
                raise KeyboardInterrupt

        def finish(self):
            self.n = -1

    progress = Failing()
    with pytest.raises(KeyboardInterrupt):
        vlmq.quantize(model, batches, "int4-g16", progress=progress)
    assert progress.n == -1
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen3_vl_moe"])
def test_a_failure_at_the_very_end_puts_the_same_tensors_back(family, monkeypatch):
    model, batches = tiny_models.build(family), tiny_models.inputs(family, 2)
    tensors = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}

    def fail(*_):
        assert packed(model)
        raise MemoryError

    monkeypatch.setattr(quantization, "pack_embedding", fail)
    with pytest.raises(MemoryError):
        vlmq.quantize(model, batches, "int4-g16", embeddings="int8-g16")
    assert dict(model.named_parameters()).keys() == tensors.keys()
    for name, parameter in model.named_parameters():
        same, place, values = tensors[name]
        assert parameter is same
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int5-g64"}, "format 'int5' of 'int5-g64' is unknown; known: int8"),
        (
            {"scheme": "int4-g48"},
            "group size 48 of 'int4-g48' is not offered; offered: g16, g32, g64, g128, channel",
        ),
        ({"solver": "awq"}, "solver 'awq' is unknown; known: rtn"),
        ({"options": {"dampp": 0.1}}, "solver 'gptq\\+cd' \\(scheme 'int4-g16'\\) takes no dampp; known:"),
        ({"options": {"damp": -1}}, "option damp must not be below 0, got -1"),
        (
            {"options": {"n_sweeps": 2}, "overrides": {"vision": "int8-g16"}},
            "solver 'gptq' \\(override 'vision' 'int8-g16'\\) takes no n_sweeps; known: act_order",
        ),
        (
            {"solver": "ternary"},
            "solver 'ternary' solves ternary formats only, got format 'int4' \\(scheme gives 'int4-g16' to layer "
            "'model.vision_tower.*'\\); leave the solver out",
        ),
        (
            {"scheme": "ternary-g16", "solver": "ternary+cd", "overrides": {"*.down_proj": "binary-g16"}},
            "got format 'binary' \\(override '\\*.down_proj' gives 'binary-g16' to layer '.*down_proj'\\)",
        ),
        ({"saliency": "attention"}, "saliency 'attention' is unknown; known: uniform"),
        ({"saliency_options": {"power": 2}}, "saliency 'uniform' takes no power; it has no options"),
        (
            {"saliency": "act_norm", "saliency_options": {"labels": "model"}},
            "saliency 'act_norm' takes no labels; known: average_kinds clip floor power temperature",
        ),
        (
            {"saliency": "loss_grad", "saliency_options": {"labels": "true"}},
            "must be 'data' or 'model', got 'true'",
        ),
        ({"saliency": "redundancy", "saliency_options": {"temperature": 2}}, "0 <= temperature <= 1, got"),
        ({"alpha": 2.0}, "alpha must be between 0 and 1, got 2.0"),
        ({"overrides": {"*visual*": "int4"}}, r"override '\*visual\*' matches no linear layer; use a part"),
        ({"overrides": {"lm_head": "int8"}}, "layer 'lm_head' cannot be quantized"),
        ({"overrides": {"*": None}}, "nothing is left to quantize"),
    ],
)
def test_wrong_arguments_fail_before_work(arguments, message):
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 1)
    with pytest.raises(ValueError, match=message):
        vlmq.quantize(model, batches, **{"scheme": "int4-g16", **arguments})
    assert not packed(model)


def test_a_solver_need_not_fit_a_scheme_that_no_layer_takes():
    model = tiny_models.build("llava")
    overrides = {"vision": "ternary-g16", "language": "ternary-g32"}
    plan = vlmq.plan(model, "int4-g16", solver="ternary", overrides=overrides)
    assert {s.solver for s in plan.schemes.values()} == {"ternary"}


def test_saliency_options_reach_the_weights():
    """A temperature of 0 makes any saliency uniform; sampled labels give other weights than the data's."""
    states = {}
    for saliency, options in (
        ("uniform", None),
        ("act_norm", None),
        ("act_norm", {"temperature": 0}),
        ("loss_grad", None),
        ("loss_grad", {"labels": "model"}),
    ):
        model = tiny_models.build("llava")
        batches = tiny_models.inputs("llava", 2)
        vlmq.quantize(model, batches, "int2-g16", saliency=saliency, saliency_options=options)
        states[saliency, str(options)] = torch.cat([m.scales.flatten() for m in packed(model).values()])
        assert model.config.quantization_config.metadata["saliency_options"] == (options or {})
    plain, norm, cold, data, sampled = states.values()
    assert torch.equal(plain, cold)
    assert not torch.equal(plain, norm)
    assert not torch.equal(data, sampled)


def test_an_empty_calibration_set_fails():
    with pytest.raises(ValueError, match="empty"):
        vlmq.quantize(tiny_models.build("llama"), [], "int4-g16")


def test_nan_activations_are_located():
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 2)
    batches[1]["pixel_values"][:] = float("nan")
    with pytest.raises(RuntimeError, match="batch 1.*NaN"):
        vlmq.quantize(model, batches, "int4-g16")
    assert not packed(model)


def test_a_second_run_adds_layers():
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 2)
    vlmq.quantize(model, batches, "int4-g16", overrides={"vision": None})
    first = set(packed(model))
    vlmq.quantize(model, batches, "int8-g16")
    assert first < set(packed(model))


@pytest.mark.parametrize("family", ["clip", "llava", "qwen3_5"])
def test_q_ffn_leaves_all_that_mixes_tokens(family):
    model = tiny_models.build(family)
    ffn, everything = vlmq.plan(model, "ternary-g16", overrides="Q-FFN"), vlmq.plan(model, overrides="Q-ALL")
    assert everything.schemes.keys() == vlmq.plan(model).schemes.keys()
    assert {name.split(".")[-2] for name in ffn.schemes} == {"mlp"}
    rest = everything.schemes.keys() - ffn.schemes.keys()
    assert rest
    assert all("attn" in name for name in rest)
    assert {ffn.kept[name] for name in rest} == {"override 'attention'"}
    assert vlmq.plan(model, overrides={"*": None, "ffn": "int4"}).schemes.keys() == ffn.schemes.keys()
