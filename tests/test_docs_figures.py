"""The figures of the pages are those of the files in eval/results that a command wrote."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SMOLLM2 = ("int4-g64", "int3-g64", "int2-g64", "ternary-g64", "binary-g64")
SALIENCIES = ("uniform", "loss_grad", "block_grad")


def lines(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def rows(page, heading):
    """The cells of a table, found by the start of its first line."""
    text = (ROOT / page).read_text()
    assert text.count(f"\n{heading}") == 1, f"{page} has no table, or several, that begin with {heading!r}"
    block = text[text.index(f"\n{heading}") + 1 :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def assert_shown(cells, expected, where):
    """Compare all numbers of some cells with those expected, each as far as its digits go."""
    shown = NUMBER.findall(" ".join(cells))
    allowed = [0.51 * 10.0 ** -len(number.partition(".")[2]) for number in shown]
    assert len(shown) == len(expected), where
    for number, value, far in zip(shown, expected, allowed, strict=True):
        assert abs(float(number) - value) <= far, (
            f"{where}: the page shows {number}, the results file {value}"
        )


def smollm2(scheme):
    runs = [
        line
        for line in lines("smollm2.jsonl")
        if line["scheme"] == scheme
        and not line["options"]
        and line.get("n_calib", 64) == 64
        and (line["settings"]["alpha"], line["settings"]["saliency"]) == (0.5, "uniform")
        and line["settings"]["solver"] == ["gptq+cd"]
    ]
    assert len({line["seed"] for line in runs}) == 3
    perplexities = [line["perplexity"] for line in runs]
    return [
        mean(perplexities),
        min(perplexities),
        max(perplexities),
        runs[0]["true_bits_per_weight"],
        runs[0]["bytes_on_disk"] / 1e6,
    ]


def demo():
    record = json.loads((RESULTS / "demo.json").read_text())
    return {
        m["model"]: [100 * m["accuracy"], m["answer_nll"], m["bits_per_weight"], m["megabytes"]]
        for m in record["models"]
    }


def test_readme_shows_what_was_measured():
    shown = {row[0].strip("`"): row[1:] for row in rows("README.md", "| scheme | perplexity | range |")}
    small = demo()
    for scheme in SMOLLM2:
        assert_shown(shown[scheme][:4], smollm2(scheme), f"README {scheme}")
    for scheme in small.keys() - {"original"}:
        assert_shown(shown[scheme][4:], small[scheme][:2], f"README {scheme}, small VLM")
    assert_shown(shown["original, bfloat16"][4:], small["original"][:2], "README original, small VLM")


def test_readme_shows_speed_and_memory():
    small, smollm2 = json.loads((RESULTS / "edge.json").read_text())["groups"]
    table = rows("README.md", "| | SmolLM2: tokens/s |")
    assert len(table) == 4
    for row, s, v in zip(table, smollm2, small, strict=False):
        speeds = [
            [m[key] for key in ("tokens_per_second", "speedup", "peak_megabytes", "bits_per_weight")]
            for m in (s, v)
        ]
        expected = [*speeds[0], s["perplexity"], *speeds[1], 100 * v["accuracy"]]
        assert_shown(row[1:], expected, f"README speed {row[0]}")
        name = row[0].strip("`") if "`" in row[0] else "bfloat16"
        assert s["model"] == f"smollm2-{name}"


def test_results_of_both_models():
    shown = {row[0].strip("`"): row[1:] for row in rows("docs/results.md", "| scheme | perplexity | range |")}
    for scheme in SMOLLM2:
        assert_shown(shown[scheme], smollm2(scheme), f"results {scheme}")
    small = demo()
    for row in rows("docs/results.md", "| | accuracy | answer NLL |"):
        assert_shown(row[1:], small[row[0].strip("`")], f"results {row[0]}, small VLM")


def test_results_of_saliencies():
    measured = [line for line in lines("shapes.jsonl") if line["alpha"] == 0.5 and line["solver"] is None]
    table = rows("docs/results.md", "| scheme | parts | `uniform` |")
    assert len(table) == 8
    for scheme, parts, *cells in table:
        key = scheme.strip("`"), parts
        expected = [
            mean(m["nll"] for m in measured if (m["scheme"], m["parts"], m["saliency"]) == (*key, saliency))
            for saliency in SALIENCIES
        ]
        assert_shown(cells, expected, f"saliencies {key}")


@pytest.mark.parametrize(("heading", "group"), [("| the embedded model |", 0), ("| SmolLM2-135M |", 1)])
def test_speed_of_both_models(heading, group):
    measured = json.loads((RESULTS / "edge.json").read_text())["groups"][group]
    table = rows("docs/speed.md", heading)
    assert len(table) == len(measured)
    for row, m in zip(table, measured, strict=True):
        quality = (
            [100 * m["accuracy"], m["answer_nll"]]
            if group == 0
            else [m["perplexity"], m["decode_perplexity"]]
        )
        expected = [
            m["tokens_per_second"],
            m["speedup"],
            m["weight_megabytes"],
            m["peak_megabytes"],
            m["bits_per_weight"],
            *quality,
        ]
        assert_shown(row[1:], expected, f"speed {row[0]}")


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_families_covered(page):
    families = (ROOT / "docs" / "families.md").read_text()
    image_text, dual = re.findall(r"^## .*: (\d+) of (\d+) covered", families, re.MULTILINE)
    text = " ".join((ROOT / page).read_text().split())
    assert f"Of the {image_text[1]} image-text-to-text families" in text
    assert f"{image_text[0]} are covered, and all {dual[1]} of dual encoders" in text
    assert dual[0] == dual[1]


def test_speed_of_one_layer():
    records = json.loads((RESULTS / "cpu_kernels.json").read_text())
    measured = {(r["threads"], row["name"], row["isa"]): row for r in records for row in r["rows"]}
    table = rows("docs/speed.md", "| layer | one thread |")
    assert len(table) == 7
    for name, *cells in table[:-1]:
        expected = []
        for threads in (1, 2):
            best, avx2 = (measured[threads, name.strip("`"), isa] for isa in ("avx512vnni", "avx2"))
            assert (
                cells[2 + 3 * (threads - 1)]
                == f"{avx2['speedup']:.1f} x, {100 * avx2['bandwidth_share']:.0f} %"
            )
            expected += [best["speedup"], 100 * best["bandwidth_share"]]
        assert_shown([cells[i].rstrip(" x%") for i in (0, 1, 3, 4)], expected, f"speed of {name}")


PEER_PATHS = {
    "AVX512": "TorchCpuAvx512Linear",
    "ATen": "TorchAtenLinear",
}


def test_speed_of_other_packages_layers():
    records = json.loads((RESULTS / "cpu_peers.json").read_text())
    measured = {}
    for r in records:
        for row in r["rows"]:
            words = row["name"].split()
            # Name without the version, and what computes it.
            name = f"{words[0]} {words[-1]}" if words[1:] else words[0]
            measured[r["threads"], name, row["isa"]] = row
    table = rows("docs/speed.md", "| one layer | bits | error |")
    assert len(table) == 14
    for label, *cells in table:
        name, _, path = label.removeprefix("vlmq ").replace("`", "").partition(", ")
        paths = {key[2] for key in measured if key[1] == name}
        if label.startswith("vlmq"):
            path = "avx512vnni"
        elif label.startswith("torch's"):
            name, path = "int4-g128", "torch"
        else:
            path = PEER_PATHS[path] if path else paths.pop()
        one, two = (measured[threads, name, path] for threads in (1, 2))
        expected = [one["bits_per_weight"], 100 * one["error"]]
        expected += [value for row in (one, two) for value in (row["ms"], row["speedup"])]
        assert_shown(cells, expected, f"layer {label}")
    text = (ROOT / "docs" / "speed.md").read_text()
    versions = {" ".join(row["name"].split()[:2]) for r in records for row in r["rows"] if " " in row["name"]}
    assert all(version in text for version in versions)


def test_models_of_other_packages():
    measured = json.loads((RESULTS / "peer_models.json").read_text())["models"]
    table = rows("docs/speed.md", "| SmolLM2-135M beside bitsandbytes |")
    keys = (
        "tokens_per_second",
        "speedup",
        "weight_megabytes",
        "peak_megabytes",
        "bits_per_weight",
        "perplexity",
    )
    for row, m in zip(table, measured, strict=True):
        assert_shown(row[1:], [m[key] for key in keys], f"speed of {row[0]}")


def test_attention_and_prompts():
    measured = json.loads((RESULTS / "decoding.json").read_text())["milliseconds"]
    table = rows("docs/speed.md", "| | torch, or own code | vlmq |")
    assert len(table) == 9
    for name, *cells in table:
        if name.startswith(("attention", "head")):
            expected = [measured[f"{name}: torch"], measured[f"{name}: vlmq"]]
        else:
            layer = name.replace("`", "")
            expected = [measured[f"{layer}: own code"], measured[f"{layer}: one call"]]
        assert_shown(cells, expected, name)
    table = rows("docs/speed.md", "| | torch | `ternary-g64` |")
    assert len(table) == 2
    for name, *cells in table:
        kinds = ("torch", "ternary-g64", "ternary-g64, rounded", "int4-g64", "int4-g64, rounded")
        assert_shown(cells, [measured[f"{name}: {kind}"] for kind in kinds], name)


def test_memory_of_quantize():
    measured = lines("memory.jsonl")
    assert measured[0]["packed"] == measured[1]["packed"]
    assert [m["n_blocks"] for m in measured] == [2, 2, 5]
    for row, m in zip(rows("docs/options.md", "| quantized | weights (GiB) |"), measured, strict=True):
        assert (m["model"], m["n_rows"], m["length"]) == ("llama-1536", 64, 512)
        sizes = [m[key] / 2**30 for key in ("weight_bytes", "extra_bytes")]
        assert_shown(row[1:], [*sizes, m["times_the_weights"]], f"memory {row[0]}")


def test_speed_beside_llama_cpp():
    one, two = json.loads((RESULTS / "llama_cpp.json").read_text())["groups"]
    table = rows("docs/speed.md", "| layers | bits |")
    assert len(table) == len(one) == len(two)
    for row, *measured in zip(table, one, two, strict=True):
        assert row[0].removeprefix("llama.cpp ").strip("`") == measured[0]["layers"] == measured[1]["layers"]
        pairs = [value for m in measured for value in (m["tokens_per_second"], m["ratio"])]
        assert_shown(row[1:], [measured[0]["bits_per_weight"], *pairs], f"speed of {row[0]}")


def test_other_figure_is_found():
    with pytest.raises(AssertionError, match=r"the page shows 1.25, the results file 1.26"):
        assert_shown(["1.25"], [1.26], "here")
