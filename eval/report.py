"""Tables as data: made once, shown in a terminal, in markdown or as JSON.

A table knows its columns' units and number formats, so each view prints the same digits; JSON keeps the full
values.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: `key` in JSON, `title` on top, `spec` a number format such as ".2f", or "" for text."""

    key: str
    title: str
    spec: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values in the order of the columns; None is a value that there is not."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        """Check that each row has a value per column.

        Raises:
            ValueError: a row has more or fewer.
        """
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {i} of {self.title!r}: expected {len(self.columns)} values, got {len(row)}"
                )


def format_value(value: Any, spec: str) -> str:
    """One cell as text; very large numbers in powers of ten, so that a collapsed model's still fit."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if not spec:
        return str(value)
    if spec.endswith("f") and abs(value) >= 1e5:
        return f"{value:.2g}"
    return format(value, spec)


def as_rich(table: Table) -> RichTable:
    """The table for a terminal; where it is narrow titles and texts are wrapped, numbers never cut."""
    view = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    view.collapse_padding, view.pad_edge, view.show_edge = True, False, False
    rows = _cells(table)
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows] if column.spec else []
        widest = max(map(len, [*column.title.split(), *cells]))
        justify = "right" if column.spec else "left"
        view.add_column(column.title, justify=justify, overflow="fold", min_width=widest)
    for row in rows:
        view.add_row(*row)
    return view


def as_markdown(table: Table) -> str:
    """The table in GitHub's markdown, without its title."""
    head = [column.title for column in table.columns]
    rule = ["---:" if column.spec else "---" for column in table.columns]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in cells] for cells in _cells(table))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_records(table: Table) -> list[dict[str, Any]]:
    """The rows as mappings of the columns' keys; numbers that JSON cannot write become None."""
    keys = [column.key for column in table.columns]
    return [dict(zip(keys, (_plain(value) for value in row), strict=True)) for row in table.rows]


def as_json(content: dict[str, Any]) -> str:
    """JSON text of a report; tables in it become their records."""
    ready = {key: as_records(v) if isinstance(v, Table) else _plain(v) for key, v in content.items()}
    return json.dumps(ready, indent=2, ensure_ascii=False, allow_nan=False)


def _cells(table: Table) -> Sequence[Sequence[str]]:
    return [
        [format_value(value, column.spec) for value, column in zip(row, table.columns, strict=True)]
        for row in table.rows
    ]


def _plain(value: Any) -> Any:
    """The value without numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
