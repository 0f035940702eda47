"""The ARM kernels, cross-compiled and run in an emulator where both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "kernels" / "csrc"
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
def test_arm_kernels_equal_sums_in_double(tmp_path):
    program = tmp_path / "self_check"
    flags = ["-std=c11", "-O1", "-ffp-contract=off", "-static", "-pthread", f"-I{SOURCES}"]
    files = [str(HERE / "self_check.c"), str(SOURCES / "vlmq_cpu.c")]
    subprocess.run([COMPILER, *flags, *files, "-lm", "-o", str(program)], check=True, timeout=600)
    result = subprocess.run(
        [EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["neon-dotprod", "neon", "portable"]
