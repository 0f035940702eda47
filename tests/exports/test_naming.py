"""Patterns for layers under the names that an engine has for them, among them those of vLLM."""

import re

from vlmq.exports.naming import block_tail, inside, name_pattern

TEXT = "model.language_model.layers.1.self_attn.q_proj"
TOWER = "model.vision_tower.encoder.layers.1.self_attn.q_proj"
DISK = {
    TEXT: "language_model.model.layers.1.self_attn.q_proj",
    "model.language_model.layers.11.self_attn.q_proj": "language_model.model.layers.11.self_attn.q_proj",
    TOWER: "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.self_attn.k_proj": "model.layers.0.self_attn.k_proj",
    "lm_head": "lm_head",
}


def names_matched(pattern: str) -> set[str]:
    assert pattern.startswith("re:")
    return {name for pair in DISK.items() for name in pair if re.match(pattern[3:], name)}


def test_a_layer_is_told_from_that_of_another_part_under_every_name():
    assert names_matched(name_pattern(TEXT, DISK)) == {TEXT, DISK[TEXT]}
    assert names_matched(name_pattern(TOWER, DISK)) == {TOWER, DISK[TOWER]}


def test_a_layer_without_a_rival_is_told_by_its_end():
    name = "model.layers.0.mlp.gate"
    assert names_matched(name_pattern(name, DISK)) == {name, DISK[name]}
    assert re.match(name_pattern(name, DISK)[3:], "language_model.model.layers.0.block_sparse_moe.gate")
    assert not re.match(name_pattern(name, DISK)[3:], "model.layers.10.block_sparse_moe.gate")


def test_a_layer_of_one_name_is_that_name():
    assert name_pattern("lm_head", DISK) == "lm_head"


def test_a_part_that_no_word_tells_apart_goes_by_its_full_names():
    disk = {"a.layers.0.fc": "b.layers.0.fc", "c.a.layers.0.fc": "c.b.layers.0.fc"}
    assert re.match(name_pattern("a.layers.0.fc", disk)[3:], "b.layers.0.fc")
    assert not re.match(name_pattern("a.layers.0.fc", disk)[3:], "c.a.layers.0.fc")


def test_experts_are_matched_inside_of_one_block_only():
    path = "model.language_model.layers.1.mlp.experts"
    pattern = inside(path, {path: path})[3:]
    for head in ("model.language_model", "language_model.model"):
        assert re.match(pattern, f"{head}.layers.1.mlp.experts.3.up_proj")
        assert not re.match(pattern, f"{head}.layers.11.mlp.experts.3.up_proj")
        assert not re.match(pattern, f"{head}.layers.1.mlp.shared_experts.up_proj")


def test_the_end_of_a_path_begins_with_its_block():
    assert block_tail(DISK[TOWER]) == "layers.1.self_attn.q_proj"
    assert block_tail("model.lm_head") == "lm_head"
