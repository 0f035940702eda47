"""The examples, run with few steps as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "out", "word"),
    [("distill_clip", "clip-ternary", "ternary"), ("distill_vlm", "vlm-binary", "distilled")],
)
def test_example_runs_and_saves(name, out, word, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "3"]
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | threads, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert (tmp_path / "out" / out / "model.safetensors").is_file()


def test_examples_are_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 2
    assert all(path.read_text().count("\n") <= 60 for path in files)
