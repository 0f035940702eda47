"""Holes in the heap go back to the system."""

import ctypes
import sys

import psutil
import pytest
import torch

from vlmq.heap import trim_heap


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_what_lies_between_small_allocations_goes_back():
    made = [torch.ones(2**14) for _ in range(1024)]  # 64 KiB each, from the heap
    kept = made[::16]
    del made
    before = psutil.Process().memory_info().rss
    trim_heap()
    assert before - psutil.Process().memory_info().rss > 2**25
    assert all(bool((tensor == 1).all()) for tensor in kept)
