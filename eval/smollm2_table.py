"""The tables of the SmolLM2 results: widths with the defaults, and what each setting brings.

    python -m vlmq.eval.smollm2_table eval/results/smollm2.jsonl

Lines that differ in the seed alone (the draw of the calibration rows) are one row: mean, and the range where there are
several.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmq.eval.report import Column, Table, as_markdown

N_CALIB = 64
DEFAULTS = {"alpha": 0.5, "saliency": "uniform", "solver": "gptq+cd"}

COLUMNS = (
    Column("scheme", "Scheme"),
    Column("changed", "Changed"),
    Column("perplexity", "Perplexity", ".2f"),
    Column("range", "Range"),
    Column("n_seeds", "Seeds", "d"),
    Column("bits", "True bits per weight", ".3f"),
    Column("megabytes", "On disk (MB)", ".1f"),
    Column("cpu_seconds", "CPU seconds", ".0f"),
)


def settings_of(line: Mapping[str, Any]) -> str:
    """What of a line differs from the defaults, "" for the defaults."""
    given = {**line["settings"], "solver": "+".join(line["settings"]["solver"])}
    changed = [f"{key}={given[key]}" for key, value in DEFAULTS.items() if given[key] != value]
    n_calib = line.get("n_calib", N_CALIB)
    changed += [f"n_calib={n_calib}"] if n_calib != N_CALIB else []
    return ", ".join(changed + [f"{key}={json.dumps(value)}" for key, value in line["options"].items()])


def summarise(lines: Iterable[Mapping[str, Any]]) -> Table:
    """One row for each scheme and setting, in the order of their first lines.

    Raises:
        ValueError: two lines have the same scheme, settings and seed.
    """
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        group = groups.setdefault((line["scheme"], settings_of(line)), {})
        if line["seed"] in group:
            raise ValueError(f"{line['scheme']} {settings_of(line)}: seed {line['seed']} is there twice")
        group[line["seed"]] = line
    rows = []
    for (scheme, changed), group in groups.items():
        found = list(group.values())
        perplexities = [line["perplexity"] for line in found]
        several = f"{min(perplexities):.2f} to {max(perplexities):.2f}" if len(found) > 1 else ""
        rows.append(
            (
                scheme,
                changed or "-",
                statistics.mean(perplexities),
                several,
                len(found),
                found[0]["true_bits_per_weight"],
                found[0]["bytes_on_disk"] / 1e6,
                statistics.mean(line["cpu_seconds"] for line in found),
            )
        )
    return Table("SmolLM2-135M-Instruct", COLUMNS, tuple(rows))


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
