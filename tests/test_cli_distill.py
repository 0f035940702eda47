"""`vlmq distill` on a tiny dual encoder on disk."""

import json
import sys

import pytest
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    build("clip").save_pretrained(folder / "clip")
    build_processor("clip").save_pretrained(folder / "clip")
    rows = []
    for i in range(72):
        picture(i).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    (folder / "few.jsonl").write_text("\n".join(rows[:9]))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["vlmq", "distill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_an_original_and_then_the_packed_model_with_its_teacher(run):
    options = ("--data", "pairs.jsonl", "--n-steps", "3", "--batch-size", "16", "--json")
    code, out, err = run("clip", "ffn", "--scheme", "ternary-g16", "--layers", "Q-FFN", *options)
    assert code == 0, err
    assert "step 3: validation loss" in err
    first = json.loads(out)
    assert {row["n_layers"] for row in first["parts"]} == {4}
    assert first["distilled"]["steps"] == 3
    code, out, err = run("ffn", "again", "--teacher", "clip", *options)
    assert code == 0, err
    assert json.loads(out)["distilled"]["first_validation_loss"] == pytest.approx(
        first["distilled"]["validation_loss"], rel=0.2
    )
    code, out, err = run("ffn", "never", *options)
    assert (code, out) == (2, "")
    assert "packed already: give its original as teacher=" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "few.jsonl"), "needs at least 64 pairs (1000 and more are usual), got 9"),
        (("--data", "pairs.jsonl", "--option", "soft=1"), "distill takes no soft; known:"),
        (("--data", "pairs.jsonl", "--layers", "Q-NONE"), "overrides 'Q-NONE' is no preset"),
        (("--data", "pairs.jsonl", "--trained", "scale"), "trained: expected some of scales"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, folder, arguments, message):
    code, out, err = run("clip", "out", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "out").exists()
