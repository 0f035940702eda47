"""The proof of exports: what it measures, and what its committed results say."""

import copy
import json
from pathlib import Path

import pytest
import torch

from vlmq.eval import export_readers, readers
from vlmq.eval.export_models import LLAMA, open_packed
from vlmq.eval.export_readers import READERS, Case, main, measure, missing, table
from vlmq.eval.foreign_packers import read_back
from vlmq.exports.writing import packed_layers

REPOSITORY = Path(__file__).parents[2]
ROWS = json.loads((REPOSITORY / "eval" / "results" / "exports.json").read_text())["rows"]


@pytest.fixture(scope="module")
def llama():
    packed = open_packed(LLAMA, "ternary-channel")
    return packed, readers.follow(packed)


def test_every_reader_was_run_and_the_weights_are_the_same():
    asked = {(name, case.model, case.scheme, case.to) for name, r in READERS.items() for case in r.cases}
    assert asked <= {(row["reader"], row["model"], row["scheme"], row["to"]) for row in ROWS}
    assert all(row["weights"] == 0 for row in ROWS if "weights" in row)
    assert (REPOSITORY / "docs" / "export_readers.md").read_text() == table(ROWS)


def test_the_same_values_say_the_same(llama):
    packed, steps = llama
    found = readers.compare_outputs(copy.deepcopy(packed.model).dequantize(), steps)
    assert found["outputs"] == 0
    assert found["n_steps"] == 64
    assert 0 < steps.own < 1


def test_another_row_is_seen(llama):
    packed, steps = llama
    other = copy.deepcopy(packed.model).dequantize()
    weight = other.get_submodule("model.layers.1.mlp.up_proj").weight
    weight.data = weight.data.roll(1, 0)
    assert readers.compare_outputs(other, steps)["outputs"] > 2 * steps.own
    found = readers.compare_weights(packed, lambda name: other.get_submodule(name).weight)
    assert found["n_layers"] == len(packed_layers(packed.model))
    assert found["weights"] > 0


@pytest.mark.parametrize(("name", "to"), [("gguf", "gguf-small"), ("transformers, gemma", "gemma")])
def test_a_row_says_what_was_run(name, to):
    if missing(name):
        pytest.skip("a package is not installed")
    row = measure(name, Case(LLAMA, "ternary-channel", to))
    assert (row["reader"], row["to"], row["weights"]) == (name, to, 0)
    assert row["versions"]["torch"] == torch.__version__


def test_rows_are_replaced_and_others_kept(tmp_path, monkeypatch):
    file = tmp_path / "exports.json"
    file.write_text(json.dumps({"rows": ROWS}))
    old = next(row for row in ROWS if row["reader"] == "gguf")
    monkeypatch.setattr(export_readers, "missing", lambda name: [])
    monkeypatch.setattr(export_readers, "measure", lambda name, case: old | {"weights": 7.0})
    main(["gguf", "--results", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(ROWS)
    assert [row["weights"] for row in rows if row["reader"] == "gguf"].count(7.0) == 1


def test_a_reader_whose_package_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(export_readers, "find_spec", lambda module: None)
    main(["GPTQModel"])
    assert "GPTQModel: not run, gptqmodel is not installed" in capsys.readouterr().err


def test_layers_of_gptqmodel_are_read_exactly():
    pytest.importorskip("gptqmodel")
    packed = open_packed(LLAMA, "int4-g32")
    layer = next(iter(packed_layers(packed.model).values()))
    assert read_back(layer.quantized_weight()) == 0
