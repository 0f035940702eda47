"""Runs of `quantize` that were interrupted: the same bits after going on, and a clear word where it cannot."""

import os
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import tiny_models
import torch
from packed_models import run_here
from tiny_processors import build as build_processor
from tiny_processors import picture

import vlmq
from vlmq import cli, quantization, resuming
from vlmq.eval import round_trip
from vlmq.linear import QuantLinear
from vlmq.progress import SilentProgress

CHEAP = {"scheme": "int3-g16", "solver": "rtn"}
BLOCKS = ("model.layers.0.safetensors", "model.layers.1.safetensors")


class Stop(SilentProgress):
    """Interrupts after so many layers."""

    def __init__(self, after: int) -> None:
        self.n_left = after

    def layer(self, report, block_name):
        self.n_left -= 1
        if self.n_left == 0:
            raise KeyboardInterrupt


def quantized(family="llama", *, n_batches=2, seed=0, **arguments):
    """A tiny model, quantized: its tensors, and its reports without the seconds."""
    model = tiny_models.build(family, torch.bfloat16)
    vlmq.quantize(model, tiny_models.inputs(family, n_batches), seed=seed, **{**CHEAP, **arguments})
    packed = {name: m.report for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    return model.state_dict(), {name: r and replace(r, seconds=0.0) for name, r in packed.items()}


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert [name for name, tensor in found[0].items() if not torch.equal(tensor, expected[0][name])] == []
    assert found[1] == expected[1]


def interrupt(folder, after, **arguments):
    with pytest.raises(KeyboardInterrupt) as stopped:
        quantized(checkpoint_dir=folder, progress=Stop(after), **arguments)
    return stopped.value


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"family": "llava", "scheme": "int4-g16", "solver": None, "saliency": "loss_grad"},
        {"family": "qwen3_vl_moe", "scheme": "ternary-g16", "solver": None},
        {
            "scheme": "int2-g16",
            "solver": "learned",
            "options": {"n_epochs": 1},
            "embeddings": "int8-g64",
            "n_batches": 3,
        },
    ],
    ids=["loss_grad", "experts", "learned"],
)
def test_a_run_interrupted_in_several_blocks_ends_with_the_same_bits(arguments, tmp_path):
    for n_layers in (3, 8, 13):  # before the end of the first block, in the second, in the second or third
        interrupt(tmp_path, n_layers, **arguments)
    assert_same(quantized(checkpoint_dir=tmp_path, **arguments), quantized(**arguments))


def test_finished_blocks_are_not_solved_again_and_the_error_says_how_to_go_on(tmp_path, monkeypatch):
    stopped = interrupt(tmp_path / "new" / "folder", 9)
    assert stopped.__notes__ == [
        f"1 of 2 blocks are finished in {tmp_path / 'new' / 'folder'}: the same arguments go on from there"
    ]
    solved = []
    solve = quantization.quantize_block
    monkeypatch.setattr(
        quantization,
        "quantize_block",
        lambda run, block, w: (solved.append(block.spec.name), solve(run, block, w)),
    )
    for _ in range(2):
        quantized(checkpoint_dir=tmp_path / "new" / "folder")
    assert solved == ["model.layers.1"]


def test_a_block_counts_only_once_it_is_whole(tmp_path, monkeypatch):
    """Stopped while the second block is written; and as a machine leaves it that stops there."""
    write = resuming.save_file

    def write_half(tensors, path, header):
        write(tensors, path, header)
        if "layers.1" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save_file", write_half)
        with pytest.raises(KeyboardInterrupt):
            quantized(checkpoint_dir=tmp_path)
    assert contents(tmp_path).keys() == {"run.json", BLOCKS[0]}
    (tmp_path / f".{BLOCKS[1]}.0a1b2c3d.partial").write_bytes(b"half")
    assert_same(quantized(checkpoint_dir=tmp_path), quantized())


@pytest.mark.parametrize("damage", ["truncated", "altered", "other"])
def test_a_damaged_file_is_named_and_only_its_block_is_lost(tmp_path, damage):
    expected = quantized(checkpoint_dir=tmp_path)
    path = tmp_path / BLOCKS[0]
    data = path.read_bytes()
    other = (tmp_path / BLOCKS[1]).read_bytes()
    path.write_bytes(
        {"truncated": data[:-9], "altered": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "other": other}[
            damage
        ]
    )
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"layers.0.safetensors is damaged \(.+\): delete this file, and its block"
    ):
        quantized(checkpoint_dir=tmp_path)
    assert contents(tmp_path) == before
    path.unlink()
    assert_same(quantized(checkpoint_dir=tmp_path), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "of another run: seed is 0 there and 1 here. Give the same arguments"),
        ({"alpha": 0.25}, "alpha is 0.5 there and 0.25 here"),
        ({"saliency": "act_norm"}, 'saliency is "uniform" there and "act_norm" here'),
        ({"n_batches": 3}, 'calibration data is "[0-9a-f]{64}" there and'),
        (
            {"scheme": "int2-g16"},
            r'model.layers.0.*_proj is "int3-g16 rtn {}" there and "int2-g16 rtn {}" .* 10 more',
        ),
        (
            {"overrides": {"*.1.*down_proj": None}},
            'layers.1.mlp.down_proj is "int3-g16 rtn {}" there and null here',
        ),
        ({"embeddings": "int8-g64"}, "lm_head is null there and"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, arguments, message):
    interrupt(tmp_path, 9)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        quantized(checkpoint_dir=tmp_path, **arguments)
    assert contents(tmp_path) == before


def test_other_weights_another_config_and_another_version_are_refused(tmp_path, monkeypatch):
    interrupt(tmp_path, 9)
    batches = tiny_models.inputs("llama", 2)
    model = tiny_models.build("llama", torch.bfloat16)
    model.lm_head.weight.data[3, 4] += 1
    with pytest.raises(ValueError, match="of another run: weights of the model is"):
        vlmq.quantize(model, batches, **CHEAP, checkpoint_dir=tmp_path)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    model = tiny_models.build("llama", torch.bfloat16)
    model.config.rms_norm_eps = 0.125
    with pytest.raises(ValueError, match="of another run: config of the model is"):
        vlmq.quantize(model, batches, **CHEAP, checkpoint_dir=tmp_path)
    monkeypatch.setattr(resuming, "version", lambda package: "9.9")
    with pytest.raises(ValueError, match='version of vlmq is ".*" there and "9.9" here; version of torch'):
        quantized(checkpoint_dir=tmp_path)


def test_a_model_loaded_from_another_path_is_the_same(tmp_path):
    tiny_models.build("llava").save_pretrained(tmp_path / "a")
    tiny_models.build("llava").save_pretrained(tmp_path / "b")
    sums = set()
    for name in "ab":
        model = type(tiny_models.build("llava")).from_pretrained(tmp_path / name)
        sums.add(resuming._config_sum(model))
    assert len(sums) == 1


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="holds files but no run.json of a run of quantize: notes.txt; choose"
    ):
        quantized(checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="notes.txt is a file; expected a folder"):
        quantized(checkpoint_dir=tmp_path / "notes.txt")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged: give another checkpoint_dir"):
        quantized(checkpoint_dir=tmp_path)


def test_a_distillation_keeps_the_blocks_that_it_quantizes_first(tmp_path, monkeypatch):
    def distilled(folder):
        model = tiny_models.build("llama")
        options = {"n_steps": 2, "options": {"eval_every": 2}}
        vlmq.distill(
            model, tiny_models.inputs("llama", 8, rows=2), "int2-g16", **options, checkpoint_dir=folder
        )
        return model.state_dict()

    keep = resuming.FinishedBlocks.keep
    with monkeypatch.context() as patch:
        patch.setattr(resuming.FinishedBlocks, "keep", lambda self, name: (keep(self, name), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            distilled(tmp_path)
    assert contents(tmp_path / "quantized").keys() == {"run.json", BLOCKS[0]}
    found, expected = distilled(tmp_path), distilled(None)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `vlmq quantize model OUT ...` here; returns the exit code and stderr."""
    tiny_models.build("llava").save_pretrained(tmp_path / "model")
    build_processor("llava").save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(2):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(round_trip, "_run_fresh", run_here)

    def run(out, *more):
        arguments = ["--calib", "images", "--scheme", "int3-g16", "--solver", "rtn", *more]
        monkeypatch.setattr(sys, "argv", ["vlmq", "quantize", "model", out, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, capsys.readouterr().err

    return run


def test_a_command_that_is_terminated_goes_on(command, tmp_path, monkeypatch, request):
    """SIGTERM and Ctrl-C say how to go on; the same command then writes the same weights."""
    keep = resuming.FinishedBlocks.keep
    # A job that a shell started in the background ignores Ctrl-C, and this process with it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, n_finished in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):

        def keep_and_stop(self, block, number=number):
            keep(self, block)
            os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(resuming.FinishedBlocks, "keep", keep_and_stop)
            code, err = command("out", "--checkpoint-dir", "state")
        assert code == 128 + number
        assert (
            f"stopped; {n_finished} of 4 blocks are finished in state: the same arguments go on from there"
            in err
        )
        assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert command("out", "--checkpoint-dir", "state")[0] == 0
    assert command("whole")[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_without_a_folder_the_command_says_what_would_help(command, monkeypatch):
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(quantization, "quantize_block", stop)
    code, err = command("out")
    assert code == 143
    assert "stopped; nothing is kept; with --checkpoint-dir DIR the same command goes on" in err


@pytest.mark.parametrize(
    ("folder", "message"),
    [("out/state", "out/state lies in OUT (out)"), ("images", "holds files but no run.json")],
)
def test_folders_that_would_be_lost_are_refused_before_work(command, folder, message):
    code, err = command("out", "--checkpoint-dir", folder)
    assert code == 2
    assert message in err
