"""The built wheel, installed elsewhere: it holds every source file, and the three folders only under vlmq."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("calib", "kernels", "eval")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build from a copy, so that the working tree gets no build folder and lends no stale one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("vlmq", *FOLDERS):
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    subprocess.run([*command, str(source)], check=True, timeout=300)
    return next(out.glob("vlmq-*.whl"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """The wheel's content as an installer lays it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("target")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return folder


def run_elsewhere(code: str, target: Path, folder: Path) -> str:
    """Output of a fresh interpreter in `folder` that sees `target` before everything else."""
    start = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    result = subprocess.run(
        [sys.executable, "-I", "-c", start + code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_every_source_file(wheel):
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "vlmq").rglob("*.py")}
    expected |= {f"vlmq/{p.relative_to(ROOT)}" for top in FOLDERS for p in (ROOT / top).rglob("*.py")}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "vlmq" / "assets").rglob("*") if p.is_file()}
    assert sorted(expected - set(zipfile.ZipFile(wheel).namelist())) == []


def test_wheel_is_for_any_python_and_holds_the_library_and_no_c(wheel):
    assert wheel.name.startswith("vlmq-0.1.0-py3-none-")
    suffixes = {Path(name).suffix for name in zipfile.ZipFile(wheel).namelist()}
    assert (".so" in suffixes) is (shutil.which("cc") is not None)
    assert not suffixes & {".c", ".h"}


def test_wheel_has_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlmq"}


def test_installed_wheel_imports_from_another_folder(target, tmp_path):
    code = "import vlmq.calib, vlmq.kernels, vlmq.eval\n"
    code += "print(*(m.__file__ for m in (vlmq, vlmq.calib, vlmq.kernels, vlmq.eval)), sep='\\n')"
    files = run_elsewhere(code, target, tmp_path).splitlines()
    assert [Path(f).relative_to(target).parent.as_posix() for f in files] == [
        "vlmq", "vlmq/calib", "vlmq/kernels", "vlmq/eval",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_no_top_level_package(name, target, tmp_path):
    code = f"from importlib.util import find_spec\nprint(getattr(find_spec({name!r}), 'origin', None))"
    origin = run_elsewhere(code, target, tmp_path).strip()
    assert str(target) not in origin
    assert str(ROOT) not in origin
