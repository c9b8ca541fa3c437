"""Files with damage anywhere are read or refused by name: no crash, no hang, bounded memory.

BATCHNORM_MUTATIONS=10000 sets how many examples there are.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import batchnorm as bn
from support import hostile, trained

EXAMPLES = int(os.environ.get("BATCHNORM_MUTATIONS", "40"))

STATE = trained.state("convolutional")
INDEX = json.dumps({"weight_map": dict.fromkeys(STATE, "shard.safetensors")}).encode()
ORIGINALS = {
    "a.safetensors": save(STATE),
    "a.pt": hostile.saved(STATE),
    "a.pth": hostile.saved(STATE, _use_new_zipfile_serialization=False),
    "nested.pt": hostile.saved({"model": STATE, "optimizer": {"state": {0: torch.ones(3)}}, "n": [1, "a"]}),
    "a.index.json": INDEX,
}  # fmt: skip
# Where a byte tells most: the header of safetensors, the pickle, the archive's directory.
PIECES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"R.",
    b"PK\x01\x02",
    b'"F32"',
    b"running_var",
)


PIECE = st.sampled_from(PIECES) | st.binary(max_size=8)
SHARE = st.floats(0, 1)
# Half of the places are in the first or last 1500 bytes, where the descriptions are.
PLACE = st.tuples(st.sampled_from(("first", "last", "all")), SHARE)
KIND = st.sampled_from(("flip", "put", "insert", "cut", "delete", "repeat"))
CHANGE = st.tuples(KIND, PLACE, st.integers(1, 40), PIECE, st.integers(0, 7))


def changed(content, changes):
    """Return the bytes after some changes, each (kind, place, length, piece, bit)."""
    content = bytearray(content)
    for kind, (part, share), length, piece, bit in changes:
        near = int(share * min(1500, len(content)))
        at = {"first": near, "last": len(content) - near, "all": int(share * len(content))}[part]
        end = at + {"flip": 1, "put": len(piece), "insert": 0, "cut": len(content)}.get(
            kind, length
        )
        old = content[at:end]
        content[at:end] = {
            "flip": bytes(byte ^ 1 << bit for byte in old),
            "put": piece, "insert": piece, "cut": b"", "delete": b"", "repeat": old + old,
        }[kind]  # fmt: skip
    return bytes(content)


def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "shard.safetensors").write_bytes(ORIGINALS["a.safetensors"])
    for name, content in ORIGINALS.items():
        (folder / name).write_bytes(content)
        assert bn.inspect(folder / name).layers
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there")
@pytest.mark.timeout(3600)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 40, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(name=st.sampled_from(sorted(ORIGINALS)), changes=st.lists(CHANGE, min_size=1, max_size=6))
def test_a_damaged_file_is_read_or_refused_by_name(name, changes, folder):
    path = folder / name
    path.write_bytes(changed(ORIGINALS[name], changes))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    found = hostile.judge(path)
    assert found["outcome"] != "crashed" and str(path) in found["message"], found
    assert found["seconds"] < 10
    size = max(path.stat().st_size, len(ORIGINALS["a.safetensors"]))
    assert memory("VmHWM") - before <= 2 * size + hostile.SPARE
