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
    large = [torch.ones(16 << 20) for _ in range(2)]
    del large
    return faults() - before

def steps():
    step()
    return min(step() for _ in range(4))

found = [steps()]
told = bn.recycle_memory()
found.append(steps())
kept = resident()
bn.recycle_memory(False)
found += [steps(), kept - resident()]
print(json.dumps([told, *found]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_tensors_need_no_fresh_pages_until_it_is_taken_back():
    out = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    told, before, on, off, given_back = json.loads(out.stdout)
    assert told
    assert before > 32  # of 128 MiB, however large a page is
    assert on < 8
    assert off > 32
    assert given_back * 4096 > 64 << 20


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was asked"))
    assert bn.recycle_memory() is False
