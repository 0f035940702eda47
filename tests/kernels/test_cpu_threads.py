"""The threads of the C kernels: torch's own, ours, late ones, several callers, forks."""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import ISAS, LIBRARY, needs_library, random_layer

from vlmq.kernels.library import torch_team

RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TEAM = ctypes.CFUNCTYPE(None, RUN, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_num_threads(1)
    if not isinstance(LIBRARY, str):
        LIBRARY.vlmq_use_team(torch_team())


@pytest.fixture(params=["torch's threads", "own threads"])
def own_threads(request):
    if request.param == "own threads":
        LIBRARY.vlmq_use_team(None)


def fake_team(n_comes, late_seconds=0.0):
    """A team of which n_comes threads come, one after the other; the rest is waited for in vain."""
    calls = []

    def parallel(run, data, n_threads, flags):
        calls.append(n_threads)
        for _ in range(n_comes):
            run(data)
        time.sleep(late_seconds)

    team = TEAM(parallel)
    LIBRARY.vlmq_use_team(ctypes.cast(team, ctypes.c_void_p))
    return team, calls


@needs_library
def test_torch_lends_its_threads():
    assert (torch_team() is not None) == ("OpenMP" in torch.__config__.parallel_info())


@needs_library
@pytest.mark.parametrize("n_comes", [1, 2, 5])
def test_a_team_does_every_row_once_whoever_comes(n_comes):
    layer, x = random_layer("int4", 900, 1100, 64), torch.randn(2, 1100)
    expected = layer(x)
    torch.set_num_threads(2)
    team, calls = fake_team(n_comes)
    assert torch.equal(layer(x), expected)
    assert calls == [2]
    del team


@needs_library
def test_small_layers_wake_nobody():
    layer, x = random_layer("int4", 90, 1100, 64), torch.randn(1, 1100)
    torch.set_num_threads(2)
    team, calls = fake_team(1)
    layer(x)
    assert calls == []
    del team


@needs_library
def test_a_late_team_is_left_alone_for_longer_each_time():
    layer, x = random_layer("int4", 1000, 1100, 64), torch.randn(1, 1100)
    expected = layer(x)
    torch.set_num_threads(2)
    team, calls = fake_team(1, late_seconds=0.01)
    at = []
    for i in range(120):
        assert torch.equal(layer(x), expected)
        if len(calls) > len(at):
            at.append(i)
    assert at == [0, 33, 98]  # 32 calls without it, then 64
    del team
    team, calls = fake_team(1)
    for _ in range(20000):  # a busy machine makes some of them late
        layer(x)
        if len(calls) > 30:
            break
    assert len(calls) > 30  # a team in time is used again
    del team


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_does_not_change_a_bit(isa, own_threads):
    layer = random_layer("int4", 1500, 1100, 64, isa)
    x, many = torch.randn(3, 1100), torch.randn(20, 1100)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append((layer(x), layer.unpack(slice(0, 1500), torch.bfloat16), layer(many[:16])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_library
def test_two_threads_of_a_program_may_call_at_a_time():
    layer = random_layer("ternary", 1500, 1100, 64)
    inputs = [torch.randn(2, 1100) for _ in range(24)]
    expected = [layer(x) for x in inputs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(layer, inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    layer, x = random_layer("ternary", 2000, 1024, None), torch.randn(1, 1024)
    torch.set_num_threads(2)
    before = layer(x)
    for _ in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if all(torch.equal(layer(x), before) for _ in range(3)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(layer(x), before)
    torch.set_num_threads(1)
