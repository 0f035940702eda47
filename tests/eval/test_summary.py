"""The tables of a packed model."""

import tiny_models

import vlmq
from vlmq.eval.report import as_records
from vlmq.eval.summary import layer_table, part_table


def test_part_table_gives_the_effective_tokens_of_the_layer_that_has_least():
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 3)
    vlmq.quantize(
        model, batches, "int4-g16", solver="rtn", saliency="redundancy", saliency_options={"power": 3.0}
    )
    layers = as_records(layer_table(model))
    for row in as_records(part_table(model)):
        members = [r for r in layers if ("vision" in r["name"]) == (row["part"] == "vision")]
        least = min(members, key=lambda r: r["n_effective"])
        assert len(members) == row["n_layers"]
        assert row["n_effective"] == least["n_effective"]
        assert 1 <= row["n_effective"] < least["n_tokens"]


def test_tables_of_a_model_without_reports_leave_measures_out(tmp_path):
    model = tiny_models.build("llama")
    vlmq.quantize(model, tiny_models.inputs("llama", 1), "int4-g16", solver="rtn")
    vlmq.save(model, tmp_path / "packed")
    (tmp_path / "packed" / "vlmq_report.json").unlink()
    (row,) = as_records(part_table(vlmq.load(tmp_path / "packed")))
    assert row["n_layers"] == 14
    assert [row[key] for key in ("proxy_loss", "seconds", "n_effective")] == [None] * 3
