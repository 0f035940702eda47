"""The C library of the CPU kernels, opened through ctypes.

It is built when vlmq is installed (setup.py) and lies beside this file; where there was no compiler, it does not.
Nothing is opened or compiled on import.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI = 7
PATH = Path(__file__).parent / "libvlmq_cpu.so"
INSTALL = "install a C compiler (gcc or clang) and install vlmq again"


class FormatRecord(ctypes.Structure):
    """`vlmq_format` of csrc/vlmq_cpu.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("n_terms", ctypes.c_int32),
        ("has_zero", ctypes.c_int32),
        ("first", ctypes.c_float),
        ("step", ctypes.c_float),
        ("zero_step", ctypes.c_float),
        ("table", (ctypes.c_uint8 * 16) * 2),
    )


class LayerRecord(ctypes.Structure):
    """`vlmq_layer` of csrc/vlmq_cpu.h."""

    _fields_ = (
        ("plan", ctypes.c_void_p),
        ("qweight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("bias_dtype", ctypes.c_int32),
    )


@cache
def open_library(path: Path = PATH) -> ctypes.CDLL | str:
    """Open the library; where that fails, say why in words."""
    if not path.exists():
        return f"its C library was not built; {INSTALL}"
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return f"its C library cannot be opened ({error}); {INSTALL}"
    if (abi := library.vlmq_abi()) != ABI:
        return f"its C library is of another version ({abi} instead of {ABI}); {INSTALL}"
    library.vlmq_use_team(torch_team())
    return library


def torch_team() -> Any:
    """Find GOMP_parallel of the OpenMP runtime that torch runs on, by which its threads can be used; None without.

    It is looked up from torch's own library, for there may be other runtimes in the process.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        return ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return None


def isa_names(library: ctypes.CDLL) -> list[str]:
    """Names of the instruction sets that the library was compiled for, fastest first."""
    names = []
    while name := library.vlmq_isa_name(len(names)):
        names.append(name.decode())
    return names


def usable_isas(library: ctypes.CDLL) -> list[str]:
    """Those of them that this CPU has."""
    return [name for i, name in enumerate(isa_names(library)) if library.vlmq_isa_runs_here(i)]


def choose_isa(library: ctypes.CDLL, forced: str | None = None) -> str:
    """Return the fastest usable instruction set, or the one that is forced, here or by VLMQ_CPU_ISA.

    Raises:
        ValueError: the forced one is unknown, or this CPU does not have it.
    """
    usable = usable_isas(library)
    if forced is None and (value := library.vlmq_forced_isa()):
        forced = value.decode()
    if forced is None:
        return usable[0]
    if forced not in usable:
        raise ValueError(
            f"instruction set {forced!r} (VLMQ_CPU_ISA) does not run here; {' '.join(usable)} do"
        )
    return forced


def _declare(library: ctypes.CDLL) -> None:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.vlmq_isa_name.restype = ctypes.c_char_p
    library.vlmq_isa_name.argtypes = [integer]
    library.vlmq_isa_runs_here.argtypes = [integer]
    library.vlmq_forced_isa.restype = ctypes.c_char_p
    library.vlmq_plan_create.restype = pointer
    library.vlmq_plan_create.argtypes = [ctypes.POINTER(FormatRecord), long, long, integer]
    library.vlmq_plan_free.restype = None
    library.vlmq_plan_free.argtypes = [pointer]
    library.vlmq_use_team.restype = None
    library.vlmq_use_team.argtypes = [pointer]
    library.vlmq_most_tokens.restype = long
    library.vlmq_most_tokens.argtypes = [pointer]
    library.vlmq_linear.argtypes = [pointer, pointer, integer, pointer, long, integer, integer]
    library.vlmq_attend.argtypes = [pointer] * 6 + [ctypes.c_float, integer, integer, integer]
    library.vlmq_dense.argtypes = [pointer] * 4 + [long] * 3 + [integer] * 3
    library.vlmq_decode.argtypes = [pointer, pointer, integer, pointer, pointer, integer]
    library.vlmq_unpack.argtypes = [pointer, pointer, long, long, pointer, integer, integer]
