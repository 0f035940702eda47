"""The model card: what was measured is in it, and nothing else; and the whole job, from hub to hub."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hub_server import WRITE, Hub
from huggingface_hub import ModelCard
from packed_models import packed
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq import checkpoint
from vlmq.card import EVALUATION_FILE, card_text, is_own_card, keep_evaluation, write_card
from vlmq.checkpoint import CARD_FILE
from vlmq.eval.report import Column, Table
from vlmq.eval.round_trip import ROUND_TRIP_FILE, RoundTrip, weights_id

COLUMNS = (
    Column("model", "Model"),
    Column("perplexity", "Perplexity", ".2f"),
    Column("accuracy", "Accuracy", ".1%"),
)
MEASURED = Table("Evaluation", COLUMNS, (("original", 20.0, None), ("model", 21.5, None)))
SIZE = {
    "n_parameters": 1000,
    "dtype": "bfloat16",
    "n_bytes_before": 2000,
    "n_bytes_on_disk": 900,
    "true_bits_per_weight": 4.5,
    "bits_per_parameter": 6.25,
    "coverage": 0.8,
}


@pytest.fixture
def folder(tmp_path):
    """A packed model with the record of a check, as one would find it."""
    folder = checkpoint.save(packed("llama"), tmp_path / "tiny", build_processor("llama"))
    ok = (True, True, 0.0, 0.0, "what?", "a \n cat", True, None)
    found = RoundTrip(*ok, weights_id(folder), False, SIZE, {"vlmq": "0.1.0"})
    (folder / ROUND_TRIP_FILE).write_text(json.dumps(vars(found)))
    return folder


def test_card_says_what_was_measured(folder):
    keep_evaluation(folder, MEASURED, "4 windows of a text")
    text = card_text(folder, "me/tiny", base_model="them/original")
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("them/original", "quantized")
    assert data.pipeline_tag == "text-generation"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 21.5)
    assert result.dataset_name == "4 windows of a text"
    assert "| before | 20.00 | – |\n| this model | 21.50 | – |" in text
    assert 'vlmq.load("me/tiny")' in text
    assert 'AutoProcessor.from_pretrained("me/tiny")' in text
    assert "bit by bit. Asked “what?”, it answers “a cat”, as before saving." in text
    assert "| Weights | 0.0 MB as bfloat16, by the parameters | 0.0 MB on disk |" in text
    assert "80.0% of 1,000 parameters" in text


def test_card_leaves_out_what_was_not_measured(folder):
    text = card_text(folder)
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "model-index", "license", "datasets"} & data.keys()
    assert "No quality was measured" in text
    assert not re.search("erplexity|ccuracy|None|nan", text)
    assert str(folder.parent) not in text


def test_card_needs_the_check(folder):
    (folder / ROUND_TRIP_FILE).unlink()
    with pytest.raises(ValueError, match="has had no round-trip check"):
        card_text(folder)


def test_card_of_somebody_else_is_never_replaced(folder):
    (folder / CARD_FILE).write_text("# mine")
    assert not write_card(folder)
    assert (folder / CARD_FILE).read_text() == "# mine"
    (folder / CARD_FILE).unlink()
    assert write_card(folder)
    assert write_card(folder, "me/other")
    assert "# other" in (folder / CARD_FILE).read_text()


def test_saving_another_model_takes_card_and_figures_away(folder):
    keep_evaluation(folder, MEASURED, "a text")
    write_card(folder)
    assert is_own_card(folder / CARD_FILE)
    checkpoint.save(packed("llama", ("int4-g32",)), folder)
    assert not {CARD_FILE, EVALUATION_FILE, ROUND_TRIP_FILE} & {path.name for path in folder.iterdir()}
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("table", "on", "message"),
    [
        (
            Table("", COLUMNS, (("original", 20.0, None),)),
            "a text",
            'a row whose column "model" says "model"',
        ),
        (MEASURED, " ", "measured_on is missing"),
    ],
)
def test_figures_without_model_or_data_are_refused(folder, table, on, message):
    with pytest.raises(ValueError, match=message):
        keep_evaluation(folder, table, on)
    assert not (folder / EVALUATION_FILE).exists()


def test_job_from_hub_to_hub(tmp_path):
    """`vlmq quantize me/original --push me/packed` and the lines of its card, each in a process of its own."""
    hub = Hub()
    names = ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HOME")
    values = (hub.endpoint, WRITE, "1", "1", str(tmp_path / "home"))
    environment = {**os.environ, **dict(zip(names, values, strict=True))}

    def run(*arguments):
        command = [sys.executable, *arguments]
        found = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        assert WRITE not in found.stdout + found.stderr
        return found.stdout

    build("llava").save_pretrained(tmp_path / "model")
    build_processor("llava").save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "text.txt").write_text("a plain text of some length, to be measured. " * 6)
    row = {"image": "0.png", "question": "what is it?", "answer": "noise"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    hub.add("me/original", tmp_path / "model")
    shutil.rmtree(tmp_path / "model")

    measures = ("--text", "text.txt", "--length", "20", "--vqa", "rows.jsonl")
    how = ("--calib", "rows.jsonl", "--scheme", "ternary-g32", *measures, "--push", "packed", "--private")
    main = ("-c", "from vlmq.cli import main; main()")
    content = json.loads(run(*main, "quantize", "me/original", "out", *how, "--json"))
    repo = hub.repos["me/packed"]
    assert content["pushed"] == f"{hub.endpoint}/me/packed/commit/{repo.head()}"
    assert content["round_trip"]["is_identical"]
    assert repo.private
    assert list(hub.arrived.values()) == [1]
    there = {path: data for path, (_, data) in repo.files.items()}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    text = there[CARD_FILE].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("me/original", "quantized")
    assert data.pipeline_tag == "image-text-to-text"
    measured = content["evaluation"][1]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"perplexity": measured["perplexity"], "accuracy": measured["accuracy"]}
    assert content["metadata"]["calibration"] in text
    assert "calibration set: rows.jsonl: 1 rows" in text
    assert str(tmp_path).encode() not in b"".join(there.values())

    (snippet,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    printed = run("-c", f"{snippet}\nprint(type(model).__name__, type(processor).__name__)")
    assert printed.split() == ["LlavaForConditionalGeneration", "LlavaProcessor"]
    hub.shutdown()
    hub.server_close()
