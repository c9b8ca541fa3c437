"""Memory that a process keeps for its next tensors; in processes of their own, which it changes."""

import json
import platform
import subprocess
import sys

import pytest

import batchnorm as bn

LOOP = """
import json, resource
import torch
import batchnorm as bn

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def step():
    before = faults()
    large = [torch.ones(9 << 20) for _ in range(2)]  # more than glibc ever keeps by itself
    del large
    return faults() - before

def steps():
    # Holes between blocks are filled before the heap stops growing.
    return min(step() for _ in range(10))

found = [steps()]
told = bn.recycle_memory()
found.append(steps())
kept = resident()
bn.recycle_memory(False)
found.append(kept - resident())
print(json.dumps([told, *found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_tensors_need_no_fresh_pages_and_all_is_given_back():
    out = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    told, before, on, given_back = json.loads(out.stdout)
    assert told
    assert before > 16  # of 72 MiB, however large a page is
    assert on < 8
    assert given_back * 4096 > 36 << 20


def test_recycle_memory_does_nothing_without_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was asked"))
    assert bn.recycle_memory() is False
