"""The table of a results file of `vlmq.eval.shapes`: each saliency against uniform.

    python -m vlmq.eval.shapes_table eval/results/shapes.jsonl

Means over the seeds, which draw the calibration rows; the range over the seeds beside them, because it says what a
difference of means is worth.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmq.eval.report import Column, Table, as_markdown

COLUMNS = (
    Column("scheme", "Scheme"),
    Column("parts", "Parts"),
    Column("alpha", "Alpha", "g"),
    Column("solver", "Solver"),
    Column("saliency", "Saliency"),
    Column("nll", "Answer NLL", ".4f"),
    Column("range", "Range"),
    Column("accuracy", "Accuracy", ".2%"),
    Column("n_seeds", "Seeds", "d"),
    Column("bits", "True bits per weight", ".3f"),
)


def summarise(lines: Iterable[Mapping[str, Any]]) -> Table:
    """One row for each scheme, parts, alpha, solver and saliency, sorted, uniform first.

    Raises:
        ValueError: two lines differ in nothing, or the original is there twice.
    """
    groups: dict[tuple[str, str, float, str, str], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        key = (
            line["scheme"] or "original",
            line["parts"],
            line["alpha"],
            line["solver"] or "default",
            line["saliency"],
        )
        group = groups.setdefault(key, {})
        if line["seed"] in group:
            raise ValueError(f"{' '.join(map(str, key))}: seed {line['seed']} is there twice")
        group[line["seed"]] = line
    rows = []
    for key in sorted(groups, key=lambda k: (*k[:4], k[4] != "uniform", k[4])):
        found = list(groups[key].values())
        losses = [line["nll"] for line in found]
        several = f"{min(losses):.4f} to {max(losses):.4f}" if len(found) > 1 else ""
        rows.append(
            (
                *key,
                statistics.mean(losses),
                several,
                statistics.mean(line["accuracy"] for line in found),
                len(found),
                found[0]["true_bits_per_weight"],
            )
        )
    return Table("The embedded model", COLUMNS, tuple(rows))


def main() -> None:
    """Print the table of a results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    lines = parser.parse_args().results.read_text().splitlines()
    print(as_markdown(summarise(json.loads(line) for line in lines if line.strip())))


if __name__ == "__main__":
    main()
