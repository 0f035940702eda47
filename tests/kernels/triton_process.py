"""A process of its own in which Triton kernels are interpreted: the choice is made where a kernel is imported."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
from installed import older

# Found, not imported: the process that imports this module must set the variable before triton is imported.
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if older("triton", "3.7") and not older("numpy", "2.4"):
    pytest.skip("Triton's interpreter before 3.7 needs NumPy before 2.4", allow_module_level=True)


def _call(function: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    import triton_worker

    return getattr(triton_worker, function)(*args, **kwargs)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call a function of `triton_worker` by its name."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **kwargs: pool.submit(_call, function, args, kwargs).result(300)
