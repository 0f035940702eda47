"""The table of tuned tiles: keys, files, the rule where there is no entry, and tuning with made-up times."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from vlmq.formats import get_format  # noqa: E402
from vlmq.kernels import triton_config, triton_linear  # noqa: E402
from vlmq.kernels.triton_config import MatmulConfig, default_matmul, matmul_key, read_table  # noqa: E402
from vlmq.kernels.triton_tune import Shape, candidates, tune  # noqa: E402

SHAPE = Shape("int4", 128, 4096, 4096, 1)


@pytest.fixture
def gpu(monkeypatch):
    """Let a GPU be there, for what asks only for its name and size."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_linear, "n_processors", lambda device: 132)
    monkeypatch.setattr(triton_linear, "architecture", lambda device: "sm_90")


def test_tokens_are_rounded_up_in_a_key():
    keys = [matmul_key("sm_90", n, 64, 128, 4, 1, 0).split()[-1] for n in (1, 2, 3, 16, 17)]
    assert keys == ["tokens=1", "tokens=2", "tokens=4", "tokens=16", "tokens=32"]


def test_shipped_table_can_be_read():
    assert isinstance(read_table(triton_config.SHIPPED), dict)


@pytest.mark.parametrize("text", ["[1]", '{"a": [1, 2]}', '{"a": [0, 1, 1, 1, 1, 1]}', '{"a": "b"}', "{"])
def test_damaged_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json.*tune again"):
        read_table(path)


def test_tuned_entry_is_taken_and_another_shape_follows_the_rule(monkeypatch):
    tuned = MatmulConfig(64, 16, 1, 2, 4, 5)
    device = torch.device("cpu")
    key = matmul_key("cpu", 3, 96, 256, 4, 1, 64)
    choose = triton_linear.choose_config
    choose.cache_clear()
    monkeypatch.setattr(triton_linear, "tuned_table", lambda: {key: tuned})
    assert choose(device, 3, 96, 256, "int4", 64) == tuned
    rule = default_matmul("cpu", 3, 97, 256, get_format("int4"), 64, 8)
    assert choose(device, 3, 97, 256, "int4", 64) == rule
    choose.cache_clear()


def test_tiles_of_a_shape_are_looked_up_once(monkeypatch):
    found = []
    monkeypatch.setattr(triton_linear, "tuned_table", lambda: found.append(1) or {})
    triton_linear.choose_config.cache_clear()
    for _ in range(3):
        triton_linear.choose_config(torch.device("cpu"), 3, 96, 256, "int4", 64)
    assert len(found) == 1


@pytest.mark.parametrize("n_tokens", [1, 17, 64, 250])
@pytest.mark.parametrize("in_features", [1, 128, 4096])
@pytest.mark.parametrize("group_size", [0, 128])
def test_rule_gives_tiles_that_the_kernel_takes(n_tokens, in_features, group_size):
    config = default_matmul("sm_90", n_tokens, 4096, in_features, get_format("int4"), group_size, 132)
    assert config.block_m >= min(n_tokens, 64)
    assert config.blocks == 1 or group_size == 0
    assert config.splits == 1 or config.splits * 128 * config.blocks <= in_features


@pytest.mark.parametrize(
    ("arch", "n_tokens", "in_features", "name", "group_size", "block_n"),
    [
        ("sm_90", 1, 4096, "int4", 128, 128),
        ("sm_90", 1, 4096, "ternary", 0, 128),
        ("sm_90", 16, 4096, "ternary", 0, 128),
        ("sm_120", 16, 4096, "ternary", 0, 64),
        ("sm_90", 64, 4096, "int4", 32, 64),
        ("sm_90", 1, 4000, "int4", 128, 64),
        ("sm_90", 1, 4096, "int2", 0, 64),
        ("sm_90", 1, 4096, "ternary2", 128, 128),
        ("sm_90", 16, 4096, "ternary2", 128, 64),
        ("sm_100", 32, 4096, "int4", 64, 64),
        ("sm_100", 64, 4096, "int4", 64, 32),
        ("sm_120", 64, 4112, "int4", 0, 128),
        ("sm_120", 8, 4112, "binary", 128, 128),
        ("sm_120", 8, 4112, "binary", 64, 64),
        ("sm_100", 32, 4096, "int4", 128, 128),
    ],
)
def test_outputs_of_a_tile_are_those_that_spill_nothing(
    arch, n_tokens, in_features, name, group_size, block_n
):
    rule = default_matmul(arch, n_tokens, 4096, in_features, get_format(name), group_size, 132)
    assert rule.block_n == block_n


@pytest.mark.parametrize("n_tokens", [1, 32, 64])
def test_what_could_trap_is_neither_chosen_nor_tried(n_tokens):
    found = candidates(Shape("int4", 32, 4096, 4096, n_tokens), "sm_100", 148)
    assert {config.warps for config in found} == {2}
    others = candidates(Shape("int4", 128, 4096, 4096, n_tokens), "sm_100", 148)
    assert {config.warps for config in others} > {4}


def test_tuning_keeps_the_fastest_and_other_entries(tmp_path, gpu):
    path = tmp_path / "cache" / "table.json"
    fastest = candidates(SHAPE, "sm_90", 132)[5]
    lines = []
    measure = {fastest: 1.0}
    found = tune([SHAPE], path=path, measure=lambda _, tiles: measure.get(tiles, 2.0), report=lines.append)
    assert "2.00 times as fast as the rule's tiles" in lines[0]
    assert list(found.values()) == [fastest]
    tune([Shape("int2", 0, 64, 256, 2)], path=path, measure=lambda shape, config: 1.0)
    table = read_table(path)
    assert len(table) == 2
    assert table[matmul_key("sm_90", 1, 4096, 4096, 4, 1, 128)] == fastest


def test_tuning_is_refused_under_capture_and_without_a_gpu(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tune([SHAPE], path=tmp_path / "table.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="finds none; run it"):
        tune([SHAPE], path=tmp_path / "table.json")


def test_a_cut_run_leaves_the_shapes_that_were_tuned(tmp_path, gpu):
    def measure(shape, config):
        if shape != SHAPE:
            raise KeyboardInterrupt
        return 1.0

    path = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        tune([SHAPE, Shape("int2", 0, 64, 256, 2)], path=path, measure=measure)
    assert len(read_table(path)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
