"""The commands on a tiny model on disk, run as a user runs them but in this process."""

import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
from packed_models import run_here
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq import cli
from vlmq.eval import round_trip


@pytest.fixture(scope="module", autouse=True)
def _round_trip_here():
    """The round-trip check without a process of its own, which test_card and test_hub start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_trip, "_run_fresh", run_here)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and questions with images."""
    folder = tmp_path_factory.mktemp("cli")
    build("llava").save_pretrained(folder / "model")
    build_processor("llava").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("a plain text of some length, to be measured. " * 6)
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "what is it?", "answer": "noise"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "corrupt.png").write_bytes(b"no picture")
    (folder / "corrupt.jsonl").write_text(json.dumps({**rows[0], "image": "corrupt.png"}))
    (folder / "gone.jsonl").write_text(json.dumps({**rows[0], "image": "gone.png"}))
    (folder / "unanswered.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "?"}))
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run `vlmq` with arguments in the folder; returns the exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["vlmq", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def packed(folder):
    """A packed model, made by the command."""
    command = [
        "quantize",
        str(folder / "model"),
        str(folder / "packed"),
        "--calib",
        str(folder / "rows.jsonl"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["vlmq", *command, "--scheme", "int4-g32", "--override", "vision=none", "--option", "n_sweeps=2"],
        )
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return "packed"


def test_dry_run_prints_the_plan_and_writes_nothing(run, folder):
    code, out, _ = run("quantize", "model", "planned", "--dry-run", "--scheme", "int2-g64")
    assert code == 0
    assert "int2-g64" in out
    assert "true bits per weight" in out
    assert "kept: embeddings, " in out
    assert not (folder / "planned").exists()


def test_dry_run_as_json(run):
    code, out, _ = run("quantize", "model", "planned", "--dry-run", "--override", "vision=int8", "--json")
    plan = json.loads(out)
    assert code == 0
    assert {row["scheme"] for row in plan["plan"]} == {"int4-g128", "int8-g128"}
    assert 0 < plan["coverage"] < 1
    assert sum(row["share"] for row in plan["parameters"]) == pytest.approx(1)


def test_quantize_packs_what_the_overrides_leave(run, packed, folder):
    assert (folder / packed / "model.safetensors").exists()
    code, out, err = run("inspect", packed, "--layers", "--json")
    content = json.loads(out)
    assert code == 0, err
    assert {(row["part"], row["scheme"]) for row in content["parts"]} == {("language", "int4-g32")}
    assert all(row["solver"] and row["proxy_loss"] >= 0 for row in content["layers"])
    assert content["true_bits_per_weight"] == pytest.approx(4.75)
    (kernels,) = content["kernels"]
    assert kernels["n_layers"] == len(content["layers"])
    assert {row["kernel"] for row in content["layers"]} == {kernels["kernel"]}
    assert kernels["kernel"].split()[0] in {"cpu", "reference"}
    assert content["metadata"]["seed"] == 0
    assert content["metadata"]["options"] == {"n_sweeps": 2}


def test_options_of_solver_and_saliency_are_recorded(run):
    settings = (
        "--scheme",
        "int2-g32",
        "--override",
        "vision=none",
        "--solver",
        "kmeans",
        "--option",
        "n_steps=3",
    )
    weights = ("--saliency", "act_norm", "--saliency-option", "clip=null", "--saliency-option", "power=0.5")
    code, out, err = run("quantize", "model", "made", "--calib", "rows.jsonl", *settings, *weights, "--json")
    assert code == 0, err
    content = json.loads(out)
    metadata = content["metadata"]
    assert content["parts"][0]["n_effective"] == min(row["n_effective"] for row in content["layers"])
    assert metadata["options"] == {"n_steps": 3}
    assert metadata["saliency_options"] == {"clip": None, "power": 0.5}


def test_learning_shows_its_losses_and_is_recorded(run):
    settings = (
        "--scheme",
        "int2-g32",
        "--override",
        "vision=none",
        "--solver",
        "learned",
        "--option",
        "n_epochs=2",
    )
    code, out, err = run("quantize", "model", "taught", "--calib", "rows.jsonl", *settings, "--json")
    assert code == 0, err
    metadata = json.loads(out)["metadata"]
    assert metadata["solver"] == ["gptq+cd+learned"]
    assert metadata["options"] == {"n_epochs": 2}
    assert "model.language_model.layers.1 learning 2/2 loss" in " ".join(err.split())


def test_quantize_leaves_a_card_and_the_record_of_the_check(packed, folder):
    found = json.loads((folder / packed / "vlmq_round_trip.json").read_text())
    assert found["is_ok"]
    assert found["is_identical"]
    assert found["question"] == "What does the image show?"
    card = (folder / packed / "README.md").read_text()
    assert "No quality was measured" in card
    assert 'vlmq.load("packed")' in card


def test_quantize_stops_at_a_failed_check_and_leaves_the_folder(run, folder, monkeypatch):
    monkeypatch.setattr(
        round_trip, "_run_fresh", lambda work: CompletedProcess([], 1, stderr="what went wrong")
    )
    code, out, err = run("quantize", "model", "failed", "--calib", "rows.jsonl", "--scheme", "int8-g32")
    assert code == 2
    assert "a fresh process cannot load it (what went wrong); the folder is left for inspection" in err
    assert (folder / "failed" / "config.json").exists()
    assert not (folder / "failed" / "README.md").exists()
    code, _, err = run("push", "failed", "me/failed")
    assert code == 2


def test_inspect_shows_tables(run, packed):
    code, out, _ = run("inspect", packed, "--layers")
    assert code == 0
    assert "Effective tokens, least" in out
    assert "language" in out
    assert "norms, biases and other parameters" in out
    assert "4.750 true bits per weight" in out


def test_eval_measures_text_and_questions_beside_the_original(run, packed):
    measures = ("--text", "text.txt", "--length", "20", "--vqa", "rows.jsonl")
    code, out, err = run("eval", packed, *measures, "--reference", "model", "--json")
    assert code == 0, err
    original, model = json.loads(out)["evaluation"]
    assert original["model"] == "original"
    assert original["text_kl"] is None
    assert model["perplexity"] == pytest.approx(original["perplexity"], rel=0.5)
    assert 0 <= model["answer_kl"] < 1
    assert model["bits_per_parameter"] < original["bits_per_parameter"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "model", "out"), "--calib is missing"),
        (("quantize", "model", "out", "--private"), "give --push REPOSITORY too"),
        (("quantize", "model", "out", "--calib", "rows.jsonl", "--vqa", "none.jsonl"), "none.jsonl"),
        (
            ("quantize", "model", "out", "--calib", "rows.jsonl", "--text", "text.txt"),
            "too few for 1 windows of 512",
        ),
        (("push", "model", "/me/x"), "cannot push to /me/x: Repo id must"),
        (("quantize", "model", "out", "--dry-run", "--scheme", "int5"), "format 'int5'"),
        (("quantize", "model", "out", "--dry-run", "--override", "vision"), "expected PATTERN=SCHEME"),
        (("quantize", "model", "out", "--dry-run", "--override", "nothing.*=int8"), "nothing.*"),
        (
            ("quantize", "model", "out", "--dry-run", "--solver", "ternary"),
            "'ternary' solves ternary formats only",
        ),
        (
            ("quantize", "model", "out", "--calib", "rows.jsonl", "--solver", "binary", "--scheme", "int2"),
            "leave the solver out",
        ),
        (("quantize", "model", "out", "--dry-run", "--option", "damp"), "expected NAME=JSON"),
        (("quantize", "model", "out", "--dry-run", "--option", "damp=x"), "'x' is no JSON"),
        (
            ("quantize", "model", "out", "--dry-run", "--option", "dam=1"),
            "takes no dam; known: act_order damp",
        ),
        (
            ("quantize", "model", "out", "--calib", "rows.jsonl", "--option", "damp=[1]"),
            "option damp expects a finite number, got [1]",
        ),
        (("quantize", "model", "out", "--dry-run", "--alpha", "2"), "alpha must be between 0 and 1, got 2.0"),
        (
            ("quantize", "model", "out", "--dry-run", "--saliency", "attention"),
            "saliency 'attention' is unknown",
        ),
        (
            ("quantize", "model", "out", "--dry-run", "--saliency-option", "floor=0.1"),
            "saliency 'uniform' takes no floor; it has no options",
        ),
        (
            (
                "quantize",
                "model",
                "out",
                "--dry-run",
                "--saliency",
                "act_norm",
                "--saliency-option",
                "floor=1",
            ),
            "expected 0 < clip <= 1, 0 <= floor < 1",
        ),
        (
            ("quantize", "model", "out", "--dry-run", "--saliency-option", "floor"),
            "--saliency-option 'floor': expected",
        ),
        (("quantize", "model", "out", "--dry-run", "--scheme", "int4-g48"), "group size 48 of 'int4-g48'"),
        (("quantize", "model", "out", "--dry-run", "--solver", "awq"), "solver 'awq' is unknown; known: rtn"),
        (("quantize", "model", "out", "--dry-run", "--device", "here"), "device 'here' cannot be used"),
        (("quantize", "model", "model", "--calib", "rows.jsonl"), "OUT is MODEL itself"),
        (("quantize", "model", "text.txt", "--calib", "rows.jsonl"), "text.txt is a file"),
        (("quantize", "model", "text.txt/out", "--calib", "rows.jsonl"), "text.txt is a file"),
        (("quantize", "nothing", "out", "--calib", "rows.jsonl"), "nothing holds no config.json"),
        (("quantize", "model", "out", "--calib", "empty.jsonl"), "empty.jsonl is empty"),
        (("quantize", "model", "out", "--calib", "nothing"), "holds no image"),
        (("quantize", "model", "out", "--calib", "corrupt.jsonl"), "corrupt.png' is corrupt"),
        (("quantize", "model", "out", "--calib", "gone.jsonl"), "gone.png' does not exist"),
        (
            ("quantize", "model", "out", "--calib", "rows.jsonl", "--n-samples", "0"),
            "n_samples: expected at least 1",
        ),
        (("eval", "model", "--vqa", "missing.jsonl"), "there is no file 'missing.jsonl'"),
        (("eval", "model", "--vqa", "empty.jsonl"), "empty.jsonl is empty"),
        (
            ("eval", "model", "--vqa", "unanswered.jsonl"),
            "row 1 of unanswered.jsonl: expected image, question",
        ),
        (
            ("eval", "model", "--vqa", "rows.jsonl", "--batch-size", "0"),
            "batch_size: expected at least 1, got 0",
        ),
        (("eval", "model", "--text", "text.txt", "--length", "0"), "got length 0"),
        (("eval", "model", "--text", "nothing"), "nothing: Is a directory"),
        (("inspect", "nothing"), "nothing holds no config.json"),
        (("quantize", "model", ".", "--dry-run"), "it holds files but no model"),
        (("quantize", "model", "out", "--calib", "missing.jsonl"), "missing.jsonl"),
        (("eval", "model"), "nothing to measure"),
        (("eval", "model", "--text", "missing.txt"), "missing.txt"),
        (("eval", "model", "--text", "text.txt"), "too few"),
        (("inspect", "model"), "no vlmq checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, folder, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not [path.name for path in folder.iterdir() if path.name == "out" or path.name.startswith(".")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody may write to")
def test_a_read_only_folder_is_refused_before_work(run):
    code, out, err = run("quantize", "model", "/proc/vlmq", "--calib", "rows.jsonl")
    assert (code, out) == (2, "")
    assert "cannot save to /proc/vlmq: no folder can be made there" in err


def test_a_full_disk_is_refused_before_work(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, out, err = run("quantize", "model", "out", "--calib", "rows.jsonl")
    assert (code, out) == (2, "")
    assert "0 MiB are free; nothing was changed" in err
    assert "block" not in err


@pytest.mark.parametrize("n_bytes", [100, 3000])
@pytest.mark.parametrize("command", [("inspect",), ("eval", "--vqa", "rows.jsonl")])
def test_a_truncated_checkpoint_is_one_line(run, packed, folder, tmp_path, command, n_bytes):
    shutil.copytree(folder / packed, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", n_bytes)
    code, out, err = run(command[0], str(tmp_path / "cut"), *command[1:])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "is not a whole safetensors file" in err


def test_a_second_run_on_a_packed_folder_adds_the_other_part(run, packed):
    code, out, err = run(
        "quantize", packed, "both", "--calib", "rows.jsonl", "--scheme", "int8-g16", "--json"
    )
    assert code == 0, err
    found = {(row["part"], row["scheme"]) for row in json.loads(out)["parts"]}
    assert found == {("language", "int4-g32"), ("vision", "int8-g16")}
    code, out, err = run("quantize", "both", "again", "--dry-run")
    assert code == 2
    assert "nothing is left to quantize; kept: 14 layers (already quantized to int4-g32)" in err


def test_a_wrong_option_is_exit_code_2(run):
    assert run("quantize", "model", "out", "--nonsense")[0] == 2


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"vlmq {metadata.version('vlmq')}\n")
