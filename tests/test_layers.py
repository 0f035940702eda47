"""Imports go down only, read from the syntax tree; rooms kept apart by "|" never see each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. Rooms of one string are one layer; "|" keeps them apart, "," lets them see each other.
LAYERS = (
    "registry , report , options , guard , words , heap",
    "formats",
    "scheme",
    "kernels , families , linalg",
    "calls",
    "siblings , joint , known_code , decoding_attention , growing_cache , dense_step , decoder_run , watching",
    "linear | calib | solvers",
    "decoder_step",
    "decoding",
    "quantization , block_solving , expert_solving , learning , run , resuming , planning , overrides , checkpoint"
    " , staging , integrity , stored , hf , attach , embedding , opening , progress , distillation , distill_data"
    " , distill_loop , distill_losses , distill_settings , straight_through , imports , foreign",
    "exports",
    "eval",
    "card , hub",
    "terminal , cli , cli_bench , cli_distill , cli_eval , cli_export , cli_quantize , cli_show",
)
RANK = {
    room: i for i, layer in enumerate(LAYERS) for room in layer.replace("|", ",").replace(",", " ").split()
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "vlmq" else parts[0]


def imported_rooms(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {m.split(".")[1] for m in modules if m.startswith("vlmq.")}


def may_import(room: str, other: str) -> bool:
    if room == other or RANK[other] < RANK[room]:
        return True
    return RANK[other] == RANK[room] and "|" not in LAYERS[RANK[room]]


FILES = sorted(
    path
    for top in ("vlmq", "calib", "kernels", "eval")
    for path in (ROOT / top).rglob("*.py")
    if path != ROOT / "vlmq" / "__init__.py"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no place in LAYERS: give it one"
    upward = {other for other in imported_rooms(path) if other in RANK and not may_import(room, other)}
    assert upward == set(), f"{room} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("solvers", "linalg", True),
        ("calib", "solvers", False),
        ("kernels", "linear", False),
        ("cli", "eval", True),
    ],
)
def test_may_import_knows_the_order(room, other, allowed):
    assert may_import(room, other) is allowed
