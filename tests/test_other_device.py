"""quantize on a device that is not the CPU: nothing of the two is mixed, and the model stays where it lay."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


def _call(function, args):
    import other_device_worker

    return getattr(other_device_worker, function)(*args)


@pytest.fixture(scope="module")
def worker():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(_call, function, args).result(280)


def test_mixtures_of_devices_are_refused(worker):
    assert worker("refused") == ["sum", "join", "numpy", "generator"]


@pytest.mark.parametrize(
    ("family", "home", "scheme", "solver"),
    [("llava", "other", "int4-g16", None), ("llama", "cpu", "ternary-g32", "learned")],
)
def test_quantizing_mixes_no_devices(worker, family, home, scheme, solver):
    assert worker("quantized_places", family, home, "other", scheme, solver) == {home}


@pytest.mark.parametrize("family", ["llama", "qwen3_vl_moe"])
def test_originals_of_finished_blocks_wait_on_the_cpu_and_come_back(worker, family):
    finished, current, after, is_same = worker("places_of_originals", family)
    assert finished == {"cpu"}
    assert current == {"other"}
    assert after == {"other"}
    assert is_same


def test_a_model_that_was_stopped_lies_where_it_lay(worker):
    assert worker("places_after_a_stop") == {"cpu"}
