import io
import json
import math

import pytest
from rich.console import Console

from vlmq.eval.report import Column, Table, as_json, as_markdown, as_records, as_rich, format_value

TABLE = Table(
    "Sizes",
    (Column("name", "Name"), Column("bits", "Bits per weight", ".2f"), Column("n", "Weights", ",")),
    (("int4", 4.3751, 12345), ("a|b", None, 7)),
)


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (1.234, ".2f", "1.23"),
        (None, ".2f", "–"),
        (math.nan, ".2f", "–"),
        (3.4e8, ".2f", "3.4e+08"),
        (math.inf, ".2f", "inf"),
        (0.987, ".1%", "98.7%"),
        ("int4", "", "int4"),
        (12345, ",", "12,345"),
    ],
)
def test_format_value(value, spec, text):
    assert format_value(value, spec) == text


def test_as_markdown_aligns_numbers_and_escapes_bars():
    assert as_markdown(TABLE).splitlines() == [
        "| Name | Bits per weight | Weights |",
        "| --- | ---: | ---: |",
        "| int4 | 4.38 | 12,345 |",
        "| a\\|b | – | 7 |",
    ]


def test_as_records_keeps_full_values():
    assert as_records(TABLE)[0] == {"name": "int4", "bits": 4.3751, "n": 12345}


def test_as_json_writes_no_number_that_json_does_not_know():
    content = {"sizes": TABLE, "loss": math.inf, "deep": {"x": [math.nan, 1.0]}}
    back = json.loads(as_json(content))
    assert back["loss"] is None
    assert back["deep"] == {"x": [None, 1.0]}
    assert back["sizes"][1]["name"] == "a|b"


def test_as_rich_shows_every_cell():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(as_rich(TABLE))
    text = console.export_text()
    assert all(cell in text for cell in ("Sizes", "Bits per weight", "4.38", "12,345", "–"))


@pytest.mark.parametrize("width", [20, 30, 80])
def test_as_rich_never_cuts_a_number_and_folds_text(width):
    table = Table(
        "Layers",
        (Column("name", "Layer"), Column("n", "Weights", ","), Column("loss", "Proxy loss", ".2e")),
        (("model.layers.0.self_attn.q_proj", 2967552, 0.00242),),
    )
    console = Console(width=width, record=True, file=io.StringIO(), soft_wrap=True)
    console.print(as_rich(table))
    lines = console.export_text().splitlines()
    assert any("2,967,552" in line and "2.42e-03" in line for line in lines)
    assert "…" not in "".join(lines)
    name = "".join(line.split("  ")[0].split(" ")[0] for line in lines[lines.index(_rule(lines)) + 1 :])
    assert name == "model.layers.0.self_attn.q_proj"


def _rule(lines):
    return next(line for line in lines if set(line.strip()) == {"─"})


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="row 0 of 'T': expected 1 values, got 2"):
        Table("T", (Column("a", "A"),), ((1, 2),))
