"""Machine code of the kernels without a GPU: compiled ahead of time, taken apart, counted."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vlmq.formats import get_format  # noqa: E402
from vlmq.kernels import triton_linear  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes that one thread block can have, by compute capability."""
OF_LAYER = ("p_weight", "p_scales", "p_zeros", "p_bias", "N")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class MachineCode:
    """What a kernel became: its instructions, which are read when asked for, and what the compiler says of it."""

    cubin: bytes
    ptx: str
    shared_bytes: int

    @cached_property
    def stack_bytes(self) -> int:
        """Local memory of a thread: 0 if no register is spilled."""
        usage = _output("cuobjdump", "-res-usage", self.cubin)
        sizes = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
        assert sizes is not None, usage
        return int(sizes[1]) + int(sizes[2])

    @cached_property
    def all(self) -> Counter[str]:
        """Instructions of the kernel."""
        return _count(self._lines)

    @cached_property
    def loop(self) -> Counter[str]:
        """Instructions of its main loop."""
        return _count(max(_loops(self._lines), key=len, default=[]))

    @cached_property
    def _lines(self) -> list[str]:
        return _output("nvdisasm", "-c", self.cubin).splitlines()


def skip_without_tools() -> None:
    missing = [name for name in ("ptxas", "nvdisasm", "cuobjdump") if not (TOOLS / name).exists()]
    if missing:
        pytest.skip(f"triton was installed without {', '.join(missing)}")


def kernel_format(name: str) -> tuple[int, int, float, float]:
    return triton_linear.kernel_format(get_format(name))


def compile_kernel(
    kernel,
    arch: int,
    pointers: dict[str, str | None],
    constants: dict,
    *,
    layers: int = 0,
    warps: int = 4,
    stages: int = 1,
    unaligned: tuple[str, ...] = (),
) -> MachineCode:
    """Compile for sm_<arch>: `pointers` have types (None: no such tensor), other arguments are int32.

    Pointers and sizes are multiples of 16, as those of large layers are, but for those that are named `unaligned`.
    `layers` in one launch have an entry of their own for each argument of `OF_LAYER`.
    """
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    signature, given, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else pointers.get(name, "i32")
        is_tuple = layers > 0 and name in OF_LAYER and constants.get(name, 0) is not None
        signature[name] = (kind,) * layers if is_tuple else kind
        paths = [(i, layer) for layer in range(layers)] if is_tuple else [(i,)]
        if name in constants:
            given |= dict.fromkeys(paths, constants[name])
        elif name not in ("M", "n_splits", *unaligned):
            divisible |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, signature, constexprs=given, attrs=divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return MachineCode(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _output(tool: str, option: str, cubin: bytes) -> str:
    # A second where the machine is idle; the limit is there for a tool that hangs.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout


def _loops(lines: list[str]) -> list[list[str]]:
    """Lines between each label and a later branch back to it."""
    labels: dict[str, int] = {}
    loops = []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = i
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and branch[1] in labels:
            loops.append(lines[labels[branch[1]] : i + 1])
    return loops


def _count(lines: list[str]) -> Counter[str]:
    found = (_INSTRUCTION.search(line) for line in lines)
    return Counter(match[1].split(".")[0] for match in found if match)
