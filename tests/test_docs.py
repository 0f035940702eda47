"""Every fenced block of README and tutorials runs and prints what the page shows; links and paths lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import typer
from hub_server import connect
from markdown_pages import CommandError, apply_diff, broken_links, check_output, fenced_blocks, run_page
from packed_models import run_here

from vlmq import cli
from vlmq.eval import round_trip
from vlmq.eval.easy_vqa_data import demo_model_path, shapes_path

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if fenced_blocks(path.read_text()))
WITH_LINKS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK_START = "HuggingFaceTB/SmolVLM-256M-Instruct"
HUB, CLONE, EXPORT = "push_to_a_hub", "add_a_solver", "export_to_vllm"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = connect(monkeypatch, tmp_path)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def _as_it_was():
    """The round trip without a process of its own, which test_card starts, and the number of threads put back."""
    n_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_trip, "_run_fresh", run_here)
        yield
    torch.set_num_threads(n_threads)


def clone(folder):
    """A tree whose solvers can be changed; all else is linked."""
    (folder / "vlmq").mkdir()
    for path in [*(ROOT / "vlmq").iterdir(), *(ROOT / name for name in ("calib", "kernels", "eval"))]:
        (folder / "vlmq" / path.name).symlink_to(path)
    (folder / "vlmq" / "solvers").unlink()
    shutil.copytree(ROOT / "vlmq" / "solvers", folder / "vlmq" / "solvers")
    for name in ("tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)


def run_python(line):
    """Run pytest, or a script, in a process that sees the tree in the current folder."""
    program, *arguments = line.split()
    start = {"pytest": ["-m", "pytest", "-p", "no:cacheprovider"], "python": []}[program]
    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise CommandError(done.stdout + done.stderr)
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch, request):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", str(work))
    if page.stem == HUB:
        request.getfixturevalue("hub")
    if page.stem == EXPORT:
        pytest.importorskip("compressed_tensors")
    if page.stem == CLONE:
        clone(work)
    run_page(page, run_python if page.stem == CLONE else None)


@pytest.mark.usefixtures("hub")
def test_readme_runs(tmp_path, monkeypatch):
    """On the small model and a few pictures in place of the hub's model and the user's data."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(shapes_path()) as archive:
        archive.extractall("my_images", [f"calibration/{name}.png" for name in (439, 646)])
        questions = archive.read("test.jsonl").decode().splitlines()[:2]
        archive.extractall(".", [json.loads(line)["image"] for line in questions])
    Path("questions.jsonl").write_text("\n".join(questions))
    text = (ROOT / "README.md").read_text()
    Path("some.txt").write_text("what color is the shape? " * 300)
    assert text.count(QUICK_START) == 1
    Path("page.md").write_text(re.sub(rf"{QUICK_START}|\bMODEL\b", str(demo_model_path()), text))
    run_page(Path("page.md"))
    for folder in ("out", "OUT", "THERE"):
        assert Path(folder, "model.safetensors").is_file()


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_point_at_something(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_that_a_page_names_are_there(page):
    top = "|".join(("calib", "docs", "eval", "examples", "kernels", "tests", "vlmq"))
    named = re.findall(rf"`((?:{top})/[^`\s]*)`", page.read_text())
    assert [path for path in named if not any(ROOT.glob(path))] == []


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_a_page_shows_can_be_given(page):
    commands = typer.main.get_command(cli.app)
    for line in re.findall(r"^ {4}(vlmq .*)$", page.read_text(), re.MULTILINE):
        _, name, *arguments = shlex.split(line, comments=True)
        if name != "--help":
            commands.commands[name].make_context(name, arguments)


def test_link_to_nothing_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One, `two` & Three!\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md#one-two--three) [y](c.md) ![z](b.png) [v](b.md#four) [w](#five) [u](https://a.b/c)\n"
    )
    assert broken_links(page) == ["c.md", "b.png", "b.md#four", "#five"]


def test_every_special_page_is_there():
    assert {HUB, CLONE, EXPORT} <= {page.stem for page in PAGES}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "the page shows\n2"),
        ("```python\nx = 1\n```\n\n```python\nraise ValueError(x)\n```\n", "page.md:6: ValueError: 1"),
        ("```python\nx = 1\n```\n\n```text\nValueError: 1\n```\n", "the block prints"),
        ("```sh\nvlmq bench preset:none\n```\n", "page.md:2: error: preset 'none' is unknown"),
        ("```sh\nvlmq inspect --help\n```\n\n```text\nUsage\n```\n", "the page shows"),
    ],
)
def test_block_can_fail(text, message, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=message):
        run_page(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```json\n1\n```\n", "unknown block 'json'"),
        ("```python skip\n1\n```\n", "unknown block 'python skip'"),
        ("words\n\n```text\n1\n```\n", "output of no block"),
        ("```python\n1\n", "not closed"),
    ],
)
def test_block_that_would_not_run_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        fenced_blocks(text)


def test_diff_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\ntwo\n")
    diff = "--- a/a.txt\n+++ b/a.txt\n@@ -1,2 +1,3 @@\n one\n+and\n two\n"
    apply_diff(diff)
    assert Path("a.txt").read_text() == "one\nand\ntwo\n"
    with pytest.raises(ValueError, match=r"a.txt does not hold once"):
        apply_diff(diff)


def test_error_that_is_shown_is_compared(tmp_path):
    (tmp_path / "page.md").write_text("```python\nint('x')\n```\n\n```text\nValueError: ... 'x'\n```\n")
    run_page(tmp_path / "page.md")


def test_numbers_may_differ_a_little():
    check_output("loss 0.100 of 3 ...", "loss 0.104\nof 3 layers", "here")
    for printed in ("loss 0.110 of 3 layers", "loss 0.100 of 4 layers", "loss 0.100"):
        with pytest.raises(AssertionError):
            check_output("loss 0.100 of 3 ...", printed, "here")
