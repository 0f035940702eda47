"""Walking the blocks of every family: exact inputs on both paths, nothing left behind, errors that name the way out."""

import contextlib
import gc

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from walk_oracle import (
    all_names,
    all_parts,
    assert_exact,
    assert_same_calls,
    make_batches,
    perturb,
    plain_inputs,
)

from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.calib.trees import leaves
from vlmq.calib.walk import calls_in_order, layer_inputs, walk_blocks
from vlmq.families import describe

FAMILIES = list(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_equal_a_plain_forward_when_nothing_is_quantized(family):
    model, batches = tiny_models.build(family), make_batches(family)
    plain = plain_inputs(model, all_names(model), batches)
    walked = []
    for block in walk_blocks(model, describe(model), batches, parts=all_parts(model)):
        walked.append(block.spec.name)
        assert_same_calls(block.inputs, plain[block.spec.name], block.spec.name)
        assert all(a is b for a, b in zip(block.inputs, block.original_inputs, strict=True))
    assert sorted(walked) == sorted(all_names(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_path_equals_a_plain_forward_of_its_model(family):
    assert_exact(tiny_models.build(family), make_batches(family))


def test_what_is_both_output_and_input_is_held_once_and_parameters_are_not_copied():
    model, batches = tiny_models.build("llama"), make_batches("llama")
    before: list[torch.Tensor] | None = None
    for block in walk_blocks(model, describe(model), batches):
        inputs = [call.args[0] for call in block.original_inputs]
        assert before is None or all(a is b for a, b in zip(inputs, before, strict=True))
        masks = [
            leaf for call in block.inputs for leaf in leaves(call.kwargs) if isinstance(leaf, torch.Tensor)
        ]
        assert len({id(mask) for mask in masks}) * len(batches) == len(masks)
        assert block.original is not block.module
        assert all(
            p is q for p, q in zip(block.original.parameters(), block.module.parameters(), strict=True)
        )
        before = block.original_outputs
        perturb(block.module)
    assert before


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "clip", "llama"])
def test_paths_are_exact_in_bfloat16(family):
    batches = make_batches(family, dtype=torch.bfloat16)
    assert_exact(tiny_models.build(family, torch.bfloat16), batches)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "clip", "llama"])
@pytest.mark.parametrize("part", ["vision", "language", "text"])
def test_a_walk_of_one_part_sees_the_others_as_they_are(family, part):
    model, batches = tiny_models.build(family), make_batches(family, rows=2)
    if part in all_parts(model):
        assert_exact(model, batches, {part})
    else:
        with pytest.raises(ValueError, match="no block to walk"):
            walk_blocks(model, describe(model), batches, parts={part})


def test_the_projector_is_walked_only_if_chosen():
    model, batches = tiny_models.build("llava"), make_batches("llava")
    parts = [b.spec.part for b in walk_blocks(model, describe(model), batches)]
    assert parts == ["vision", "vision", "language", "language"]
    assert_exact(model, batches, {"projector"})


def test_blocks_can_be_chosen_by_name():
    model, batches = tiny_models.build("llava"), make_batches("llava")
    names = ["model.language_model.layers.1", "model.vision_tower.encoder.layers.0"]
    walked = [b.spec.name for b in walk_blocks(model, describe(model), batches, names=names)]
    assert walked == names[::-1]


def test_original_outputs_are_those_of_the_untouched_block():
    model, batches = tiny_models.build("llama"), make_batches("llama")
    for block in walk_blocks(model, describe(model), batches):
        for call, output in zip(block.original_inputs, block.original_outputs, strict=True):
            assert torch.equal(block.run(call, original=True), output)
        perturb(block.module)


def test_each_block_runs_twice_per_batch_however_deep_the_model():
    model, batches = deep_llama(6), make_batches("llama", 3)
    runs = dict.fromkeys(all_names(model), 0)

    def count(name: str):
        def hook(*_):
            runs[name] += 1

        return hook

    live = {}
    for block in walk_blocks(model, describe(model), batches):
        if not live:
            runs = dict.fromkeys(runs, 0)
            live = {n: model.get_submodule(n).mlp.register_forward_hook(count(n)) for n in runs}
        perturb(block.module)
    assert set(list(runs.values())[1:]) == {2 * len(batches)}


def test_only_the_outputs_that_are_read_again_stay_in_memory():
    model, batches = deep_llama(6), make_batches("llama", 2)
    shape = (1, 12, 64)
    n_stored = []
    for block in walk_blocks(model, describe(model), batches):
        perturb(block.module)
        del block
        n_stored.append(sum(t.shape == shape for t in gc.get_objects() if type(t) is torch.Tensor))
    assert max(n_stored[2:]) == min(n_stored[2:])


def deep_llama(n_layers: int) -> PreTrainedModel:
    config = tiny_models.FAMILIES["llama"]()
    config.num_hidden_layers = n_layers
    return tiny_models.from_config(AutoModelForCausalLM, config)


@pytest.mark.parametrize("stop_at", ["trace", 0, 2, None])
def test_the_model_is_left_as_it_was(stop_at):
    model, batches = tiny_models.build("qwen3_vl"), make_batches("qwen3_vl")
    model.train()
    model.model.visual.eval()
    before = state(model)
    if stop_at == "trace":
        batches[0].inputs["input_ids"] = batches[0].inputs["input_ids"] + 10**6
    with contextlib.suppress(KeyError, IndexError):
        for i, block in enumerate(walk_blocks(model, describe(model), batches)):
            assert not model.training
            assert not any("forward" in m.__dict__ for m in model.modules())
            del block
            if i == stop_at:
                raise KeyError
    assert state(model) == before


def state(model: PreTrainedModel) -> list:
    configs = [model.config, model.config.text_config, model.config.vision_config]
    return [
        [(name, type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()],
        [len(m._forward_pre_hooks) for m in model.modules()],
        [c.to_dict() for c in configs],
        [p.requires_grad for p in model.parameters()],
        torch.is_grad_enabled(),
    ]


def test_gradients_are_enabled_while_the_consumer_works():
    model = tiny_models.build("llama")
    for _ in walk_blocks(model, describe(model), make_batches("llama")):
        assert torch.is_grad_enabled()


def test_the_walk_works_under_no_grad():
    with torch.no_grad():
        assert_exact(tiny_models.build("qwen3_vl"), make_batches("qwen3_vl"))


def test_kinds_follow_the_hidden_states():
    model, batches = tiny_models.build("llava"), make_batches("llava", rows=2)
    batches[1].kinds[0, :3] = PADDING
    batches[1].kinds[:, -2:] = ANSWER
    for block in walk_blocks(model, describe(model), batches):
        for i, kinds in enumerate(block.batches):
            if block.spec.part == "language":
                assert torch.equal(kinds, batches[i].kinds)
            else:
                assert kinds.shape == (2, 5)
                assert set(kinds.unique().tolist()) == {IMAGE}


def test_packed_patches_of_all_images_count_as_one_row_of_image_tokens():
    model, batches = tiny_models.build("qwen2_vl"), make_batches("qwen2_vl", 1, rows=2)
    block = next(walk_blocks(model, describe(model), batches))
    assert block.batches[0].shape == (1, 32)
    assert set(block.batches[0].unique().tolist()) == {IMAGE}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_one_group_share_their_input(family):
    model, batches = tiny_models.build(family), make_batches(family, 1)
    for block in walk_blocks(model, describe(model), batches):
        groups = calls_in_order(block)
        assert sorted(sum(groups, [])) == sorted(block.linears())
        for group in groups:
            inputs = next(layer_inputs(block, group))
            assert all(inputs[name] is inputs[group[0]] for name in group)
        if type(block.module).__name__ in ("LlamaDecoderLayer", "Gemma3DecoderLayer", "Qwen2DecoderLayer"):
            short = [[name.rpartition(".")[2] for name in group] for group in groups]
            attention = ["q_proj", "k_proj", "v_proj"]
            assert short == [attention, ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_groups_leave_out_what_is_already_replaced():
    model = tiny_models.build("llama")
    block = next(walk_blocks(model, describe(model), make_batches("llama")))
    assert calls_in_order(block)[0][0] == "self_attn.q_proj"
    block.module.self_attn.q_proj = nn.Identity()
    assert calls_in_order(block)[0] == ["self_attn.k_proj", "self_attn.v_proj"]


def test_layer_inputs_are_those_of_the_layer_in_the_whole_model():
    model, batches = tiny_models.build("qwen3_vl"), make_batches("qwen3_vl")
    name = "model.language_model.layers.1"
    plain = plain_inputs(model, [f"{name}.mlp.down_proj"], batches)[f"{name}.mlp.down_proj"]
    for block in walk_blocks(model, describe(model), batches, names=[name]):
        for path in ("quantized", "original"):
            for inputs, (args, _) in zip(
                layer_inputs(block, ["mlp.down_proj"], path=path), plain, strict=True
            ):
                assert torch.equal(inputs["mlp.down_proj"], args[0].flatten(0, -2))


def text_only(batch: CalibBatch) -> CalibBatch:
    ids = batch.inputs["input_ids"].clone()
    ids[ids == tiny_models.IMAGE_TOKEN] = 5
    inputs = {"input_ids": ids, "attention_mask": batch.inputs["attention_mask"]}
    return CalibBatch(inputs, torch.full(ids.shape, TEXT, dtype=torch.int8))


@pytest.mark.parametrize("family", ["llava", "smolvlm", "mistral3"])
def test_batches_without_an_image_pass_by_the_vision_part(family):
    model, batches = tiny_models.build(family), make_batches(family, 2)
    batches.insert(0, text_only(batches[0]))
    for block in walk_blocks(model, describe(model), batches):
        assert block.batch_indices == ([1, 2] if block.spec.part == "vision" else [0, 1, 2])
    assert_exact(model, batches)


def test_a_part_that_no_batch_reaches_is_refused():
    model = tiny_models.build("llava")
    batches = [text_only(batch) for batch in make_batches("llava")]
    message = "no batch reaches 2 of 4 blocks, first 'model.vision_tower.encoder.layers.0'"
    with pytest.raises(ValueError, match=message):
        next(walk_blocks(model, describe(model), batches))
    assert len(list(walk_blocks(model, describe(model), batches, parts={"language"}))) == 2


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "calibration set is empty"),
        (make_batches("llama"), {"parts": {"sound"}}, "'sound' is no part and no block"),
        (make_batches("llama"), {"names": ["model.layers.7"]}, "'model.layers.7' is no part and no block"),
        (make_batches("llama"), {"names": []}, "no block to walk"),
    ],
)
def test_bad_arguments_are_refused_at_once(batches, options, message):
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match=message):
        walk_blocks(model, describe(model), batches, **options)


def test_a_model_without_weights_is_refused():
    model = tiny_models.build("llama")
    layout = describe(model)
    with pytest.raises(ValueError, match="meta device"):
        walk_blocks(model.to("meta"), layout, make_batches("llama"))
