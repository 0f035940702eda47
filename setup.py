"""The C library of the CPU kernels: a plain shared object beside the Python files, opened through ctypes.

It needs a C compiler and nothing else. Without one, vlmq installs all the same, and says at first use what is lost.
Everything else about the package is in pyproject.toml.
"""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "vlmq.kernels.libvlmq_cpu"


class BuildLibrary(build_ext):
    """Build a shared object that knows nothing of Python: no suffix of its version, no init function."""

    def get_ext_filename(self, fullname: str) -> str:
        """Place it beside the Python files, without the suffix of an interpreter."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Name no init function."""
        return []


class PlatformWheel(bdist_wheel):
    """Name the wheel for its platform, but for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep only the platform of the tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sources=["kernels/csrc/vlmq_cpu.c"],
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
                "-g0",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
