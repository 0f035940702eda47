import copy
from dataclasses import replace

import pytest
import tiny_models
import torch

import vlmq
from vlmq import distill_loop
from vlmq.calib.tokens import ANSWER
from vlmq.distill_data import check_data, prepare_data
from vlmq.distill_settings import Settings, Tuning
from vlmq.families import describe

FAST = {"n_steps": 12, "batch_size": 16, "learning_rate": 1e-2, "options": {"eval_every": 4}}
EVERYTHING = ("scales", "zeros", "thresholds", "weights", "vectors")


def pairs(n_batches: int = 20) -> list[dict]:
    return tiny_models.inputs("clip", n_batches, rows=4)


def answers(family: str = "llava", n_batches: int = 20) -> list[dict]:
    batches = tiny_models.inputs(family, n_batches, rows=2)
    for batch in batches:
        places = torch.arange(batch["input_ids"].shape[1])[None] > 7
        batch["labels"] = torch.where(places, batch["input_ids"], -100)
    return batches


class Log:
    """Remembers what it is told; stops the run after a step if asked, as ctrl-c does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps, self.losses, self.valid, self.stop_after, self.first = [], [], {}, stop_after, None

    def start(self, n_steps, first):
        self.first = first

    def step(self, number, losses):
        self.steps.append(number)
        self.losses.append(losses)
        if number == self.stop_after:
            raise KeyboardInterrupt

    def validated(self, number, loss, is_best):
        self.valid[number] = loss

    def finish(self):
        self.is_finished = True


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def packed_clip():
    model = tiny_models.build("clip")
    return model, vlmq.quantize(copy.deepcopy(model), pairs(2), "ternary-g16", solver="rtn")


@pytest.mark.parametrize(("family", "data"), [("clip", pairs), ("llava", lambda: answers(n_batches=1) * 20)])
def test_an_original_becomes_packed_nearer_to_itself_and_saves_and_loads(family, data, tmp_path):
    model, log = tiny_models.build(family), Log()
    original, batches = copy.deepcopy(model), data()
    found = vlmq.distill(
        model, batches, "binary-g16", **{**FAST, "n_steps": 24, "learning_rate": 1e-3}, progress=log
    )
    assert found is model
    assert min(log.valid.values()) < log.valid[0]
    record = model.config.quantization_config.metadata["distilled"]
    assert record["validation_loss"] == pytest.approx(min(log.valid.values()))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "scales" in n)
    vlmq.save(model, tmp_path / "out")
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    again = vlmq.load(tmp_path / "out")
    key = "logits_per_image" if family == "clip" else "logits"
    assert torch.equal(again(**inputs)[key], model(**inputs)[key])
    assert not torch.equal(original(**inputs)[key], model(**inputs)[key])


def test_the_teacher_is_left_as_it_was(packed_clip):
    teacher, packed = packed_clip
    before = state(teacher)
    grads = [p.requires_grad for p in teacher.parameters()]
    vlmq.distill(copy.deepcopy(packed), pairs(), teacher=teacher, **FAST)
    assert same(before, state(teacher))
    assert grads == [p.requires_grad for p in teacher.parameters()]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(packed_clip):
    teacher, packed = packed_clip
    runs = [
        state(vlmq.distill(copy.deepcopy(packed), pairs(), teacher=teacher, seed=seed, **FAST))
        for seed in (0, 0, 1)
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_an_interrupted_run_goes_on_to_the_same_result(packed_clip, tmp_path):
    teacher, packed = packed_clip
    options = {
        **FAST,
        "trained": EVERYTHING,
        "teacher": teacher,
        "options": {"eval_every": 4, "soft_share": 0.5},
    }
    whole, interrupted, log = copy.deepcopy(packed), copy.deepcopy(packed), Log(stop_after=6)
    vlmq.distill(whole, pairs(), **options)
    with pytest.raises(KeyboardInterrupt):
        vlmq.distill(interrupted, pairs(), **options, checkpoint_dir=tmp_path, progress=log)
    assert log.is_finished
    resumed, log = copy.deepcopy(packed), Log()
    vlmq.distill(resumed, pairs(), **options, checkpoint_dir=tmp_path, progress=log)
    assert (log.first, log.steps[0]) == (4, 5)
    assert same(state(whole), state(resumed))
    with pytest.raises(ValueError, match="is of another distillation"):
        vlmq.distill(copy.deepcopy(packed), pairs(), **{**options, "seed": 5}, checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_best_state_and_names_layer_and_step(packed_clip, monkeypatch):
    teacher, packed = packed_clip
    model, log, layer = copy.deepcopy(packed), Log(), "vision_model.encoder.layers.1.mlp.fc1"
    step = distill_loop.Trainer._step

    def poisoned(self, example):
        if self.state.step == 9:
            with torch.no_grad():
                self.trained[f"{layer}.factors"][0] = torch.nan
        step(self, example)

    monkeypatch.setattr(distill_loop.Trainer, "_step", poisoned)
    with pytest.raises(
        RuntimeError, match=f"loss turned nan in step 10, first in layer '{layer}'; the model holds"
    ):
        vlmq.distill(model, pairs(), teacher=teacher, progress=log, **FAST)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values() if t.is_floating_point())
    # What it holds is the state of the best validation so far.
    monkeypatch.undo()
    again = Log()
    vlmq.distill(copy.deepcopy(model), pairs(), teacher=teacher, progress=again, **FAST)
    assert again.valid[0] == pytest.approx(min(log.valid.values()), rel=1e-4)
    assert isinstance(model.get_submodule(layer), vlmq.linear.QuantLinear)


def test_training_stops_when_nothing_gets_better(packed_clip, monkeypatch):
    teacher, packed = packed_clip
    log = Log()
    options = {**FAST, "n_steps": 400, "learning_rate": 1e-9, "options": {"eval_every": 2, "patience": 2}}
    vlmq.distill(copy.deepcopy(packed), pairs(), teacher=teacher, progress=log, **options)
    assert log.steps[-1] < 40


def test_gradient_checkpointing_and_bf16_give_nearly_the_same(packed_clip):
    teacher, packed = packed_clip
    logs = [Log(), Log(), Log()]
    for log, options in zip(logs, ({}, {"gradient_checkpointing": True}, {"bf16": True}), strict=True):
        vlmq.distill(copy.deepcopy(packed), pairs(), teacher=teacher, progress=log, **FAST, **options)
    plain, checkpointed, narrow = ([losses["total"] for losses in log.losses] for log in logs)
    assert checkpointed == pytest.approx(plain, rel=1e-4)
    assert narrow == pytest.approx(plain, rel=0.05)
    assert narrow != plain


def test_a_packed_embedding_stays_as_it_is():
    model = tiny_models.build("llama")
    teacher = copy.deepcopy(model)
    vlmq.quantize(model, tiny_models.inputs("llama", 1), "int2-g16", solver="rtn", embeddings="int8-g16")
    before = state(model)
    vlmq.distill(
        model, tiny_models.inputs("llama", 12, rows=2), teacher=teacher, **FAST | {"learning_rate": 1e-4}
    )
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if "embed" in name]


def test_saliency_weighs_the_answers_tokens_to_mean_one():
    model, batches = (
        tiny_models.build("llava").requires_grad_(False),
        vlmq.calib.batches.as_batches(answers(), tiny_models.build("llava")),
    )
    layout = describe(model)
    settings = Settings(
        1, 1e-3, 4, ("scales",), {}, "loss_grad", False, False, 0, Tuning(validation_share=0.2)
    )
    data = prepare_data(model, layout, batches, settings)
    assert (len(data.train), len(data.validation)) == (16, 4)
    for example in data.train:
        places = (example.kinds == ANSWER)[:, 1:]
        weights = example.weights[:, :-1]
        assert float(weights[~places].abs().max()) == 0
        torch.testing.assert_close(weights.sum(1), places.sum(1).float())
        assert float(weights[places].std()) > 0.05
    uniform = prepare_data(model, layout, batches, replace(settings, saliency="uniform"))
    assert all(example.weights is None for example in uniform.train)


@pytest.mark.parametrize(
    ("family", "data", "message"),
    [
        ("clip", lambda: pairs(3), "needs at least 64 pairs .1000 and more are usual., got 12"),
        ("clip", lambda: [{"pixel_values": b["pixel_values"]} for b in pairs()], "batch 0: a dual encoder"),
        ("clip", lambda: [b | {"input_ids": torch.ones_like(b["input_ids"])} for b in pairs()], "captions: all 80"),
        ("llava", lambda: tiny_models.inputs("llava", 20), "data without answers: rows with images must say"),
        ("llava", lambda: answers(n_batches=3), "needs at least 128 answer tokens in two batches .*got 24 in 3"),
        ("llama", lambda: tiny_models.inputs("llama", 2), "needs at least 128 tokens of text in two batches"),
    ],
)  # fmt: skip
def test_data_that_cannot_serve_is_refused(family, data, message):
    model = tiny_models.build(family)
    with pytest.raises(ValueError, match=message):
        vlmq.distill(model, data(), "ternary-g16")
    assert not any(isinstance(m, vlmq.linear.QuantLinear) for m in model.modules())


def test_a_teacher_of_another_architecture_is_refused(packed_clip):
    teacher, packed = packed_clip
    with pytest.raises(ValueError, match="packed already: give its original as teacher="):
        vlmq.distill(packed, pairs())
    with pytest.raises(ValueError, match="expected CLIPModel, got SiglipModel"):
        vlmq.distill(packed, pairs(), teacher=tiny_models.build("siglip"))
    with pytest.raises(ValueError, match="teacher is quantized itself"):
        vlmq.distill(packed, pairs(), teacher=packed)
    config = copy.deepcopy(teacher.config)
    config.vision_config.intermediate_size = 64
    wide = type(teacher)(config)
    with pytest.raises(
        ValueError, match=r"layer '.*vision.*fc1' is \(48, 32\) in the model and \(64, 32\) in the"
    ):
        vlmq.distill(packed, pairs(), teacher=wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0"),
        ({"options": {"soft_share": 1.5}}, "soft_share: expected a share"),
        ({"options": {"soft_share": 0.5}, "trained": ["scales"]}, "soft_share needs codes that can change"),
        ({"trained": ["scale"]}, "trained: expected some of scales zeros .*got .'scale'"),
        ({"losses": {"kl": 1.0}}, "loss 'kl' is unknown for CLIPModel; known: contrastive feature logits"),
        ({"losses": {"feature": 0.0}}, "one above it"),
        ({"options": {"validation_share": 1.0}}, "validation_share: expected"),
        ({"batch_size": 1}, "batch_size: expected at least 2"),
        ({"saliency": "block_grad"}, "does not weigh answers; known: uniform loss_grad"),
        ({"saliency": "loss_grad"}, "weighs the tokens of answers, a dual encoder has none"),
        ({"options": {"hard_share": 0.5}}, "distill takes no hard_share; known: eval_every max_norm"),
        ({"overrides": "Q-NONE"}, "overrides 'Q-NONE' is no preset; known: Q-ALL Q-FFN"),
    ],
)
def test_wrong_options_are_refused_before_work(options, message):
    model = tiny_models.build("clip")
    with pytest.raises(ValueError, match=message):
        vlmq.distill(model, pairs(), "ternary-g16", **options)
    assert not any(isinstance(m, vlmq.linear.QuantLinear) for m in model.modules())


def test_check_data_takes_text_for_a_language_model():
    model = tiny_models.build("llama")
    check_data(model, vlmq.calib.batches.as_batches(tiny_models.inputs("llama", 12, rows=2), model))
