"""`vlmq eval` on a tiny dual encoder on disk."""

import json
import sys

import pytest
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for family in ("clip", "llava"):
        build(family).save_pretrained(folder / family)
        build_processor(family).save_pretrained(folder / family)
    rows = []
    for i, name in enumerate(("cat", "dog", "cow", "ape", "fox", "hen")):
        (folder / "images" / name).mkdir(parents=True)
        picture(i).save(folder / "images" / name / "0.png")
        rows.append(json.dumps({"image": f"images/{name}/0.png", "caption": f"a {name}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["vlmq", "eval", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_zero_shot_and_retrieval_beside_the_original(run):
    options = ("--template", "simple", "--template", "the {}", "--reference", "clip", "--json")
    code, out, err = run("clip", "--zero-shot", "images", "--retrieval", "captions.jsonl", *options)
    assert code == 0, err
    first, second = json.loads(out)["evaluation"]
    assert [first.pop("model"), second.pop("model")] == ["original", "model"]
    assert first == second
    assert 0 <= first["zero_shot_top1"] <= first["zero_shot_top5"] <= 1
    assert first["text_to_image_10"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip", "--zero-shot", "images", "--template", "a photo"), "expected one {} for the class"),
        (
            ("no/such/model", "--zero-shot", "images"),
            "model 'no/such/model' is no folder here, nor on the hub",
        ),
        (("clip", "--zero-shot", "gone"), "'gone' is neither a folder, nor a file"),
        (("clip", "--retrieval", "images"), "expected a caption in a column of caption"),
        (("llava", "--zero-shot", "images"), "need a dual encoder such as CLIP or SigLIP, got Llava"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
