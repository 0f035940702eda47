"""The coverage of families: what the committed results say still holds, and what is counted is what it says."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from installed import needs_transformers

from vlmq.eval import families
from vlmq.eval.families import DUAL, IMAGE_TEXT, FamilyRow, examine, main, table

RESULTS = Path(__file__).parents[2] / "eval" / "results" / "families.json"
KNOWN = json.loads(RESULTS.read_text())
ROWS = {(row["kind"], row["family"]): row for row in KNOWN["families"]}
OWN_LAYOUTS = [
    (IMAGE_TEXT, "aria"),
    (IMAGE_TEXT, "blip"),
    (IMAGE_TEXT, "emu3"),
    (IMAGE_TEXT, "florence2"),
    (IMAGE_TEXT, "kimi_k25"),
    (IMAGE_TEXT, "lfm2_vl"),
    (IMAGE_TEXT, "llama4"),
    (IMAGE_TEXT, "mllama"),
    (IMAGE_TEXT, "nemotron_h_omni"),
    (IMAGE_TEXT, "qwen3_5_moe"),
    (IMAGE_TEXT, "t5gemma2"),
    (IMAGE_TEXT, "udop"),
    (DUAL, "align"),
    (DUAL, "blip-2"),
    (DUAL, "videoprism"),
]

OF_TIMM = ("fast_vlm", "gemma3n", "perception_lm")


def assert_as_recorded(kind: str, family: str) -> None:
    recorded = ROWS[kind, family]
    if transformers.__version__ != KNOWN["transformers"]:
        pytest.skip(f"the results are those of transformers {KNOWN['transformers']}")
    if family in OF_TIMM and find_spec("timm") is None:
        pytest.skip("its vision tower needs timm")
    row = examine(kind, family)
    assert row.problem == recorded.get("problem")
    assert row.stacks == recorded.get("stacks")
    assert row.share == pytest.approx(recorded["share"], abs=1e-9)
    assert row.linear_share == pytest.approx(recorded["linear_share"], abs=1e-9)


@pytest.mark.parametrize(("kind", "family"), OWN_LAYOUTS)
def test_a_family_of_its_own_layout_is_found_as_recorded(kind, family):
    assert_as_recorded(kind, family)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), sorted(ROWS.keys() - set(OWN_LAYOUTS)))
def test_every_other_family_is_found_as_recorded(kind, family):
    assert_as_recorded(kind, family)


def test_the_results_cover_what_was_aimed_for():
    covered = dict.fromkeys((IMAGE_TEXT, DUAL), 0)
    for (kind, _), row in ROWS.items():
        covered[kind] += "problem" not in row
    assert covered[IMAGE_TEXT] >= 85
    assert covered[DUAL] == 12
    assert all(r["linear_share"] >= families.LEAST_SHARE for r in ROWS.values() if "problem" not in r)


def test_the_shares_of_a_family_sum_up_to_one():
    built = [row for row in ROWS.values() if "rest" in row]
    assert len(built) > 100
    for row in built:
        assert 0 < row["share"] < 1
        assert row["share"] + sum(row["rest"].values()) == pytest.approx(1)


def test_the_table_is_the_one_of_the_results():
    rows = [FamilyRow(**{"problem": None, **row}) for row in KNOWN["families"]]
    page = (RESULTS.parents[2] / "docs" / "families.md").read_text()
    if transformers.__version__ == KNOWN["transformers"]:
        assert table(rows) == page


@needs_transformers("5.18", "has no diffusion_gemma")
def test_a_family_without_its_blocks_is_a_problem(monkeypatch):
    monkeypatch.setattr(families, "LACKS", {})
    assert examine(IMAGE_TEXT, "fuyu").problem == "no blocks of vision were found"
    row = examine(IMAGE_TEXT, "diffusion_gemma")
    assert "0.7% of the parameters in linear layers" in str(row.problem)
    assert row.rest is not None
    assert row.rest["weight shared with another layer"] > 0.9


def test_a_config_that_does_not_build_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(families, "CHANGES", {})
    row = examine(IMAGE_TEXT, "aya_vision")
    assert str(row.problem).startswith("does not build: embed_dim must be divisible by num_heads")
    assert row.stacks is None


def test_the_command_prints_and_writes_what_it_was_asked_for(capsys, tmp_path):
    main(["clip", "--results", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")])
    assert "dual encoder: 1 of 1 covered" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "a.json").read_text())["families"]
    assert row["stacks"] == {
        "text_model.encoder.layers": "text, 12",
        "vision_model.encoder.layers": "vision, 12",
    }
    assert "| clip | 0.15 B | 100.0% | " in (tmp_path / "a.md").read_text()
    with pytest.raises(ValueError, match="no family clap; known: align"):
        main(["clap"])
