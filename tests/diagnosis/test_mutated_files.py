"""Files with damage anywhere are read or refused by name: no crash, no hang, bounded memory.

BATCHNORM_MUTATIONS=10000 sets how many examples there are.
"""

import json
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import batchnorm as bn
from batchnorm.errors import CheckpointError
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


class Mutation:
    """A changed file, shown as the changes."""

    def __init__(self, name, content, changes):
        self.name, self.content, self.changes = name, content, changes

    def __repr__(self):
        return f"{self.name}: {self.changes}"


@st.composite
def mutated(draw):
    name = draw(st.sampled_from(sorted(ORIGINALS)))
    content, changes = bytearray(ORIGINALS[name]), []
    for _ in range(draw(st.integers(1, 6))):
        # Half of the places are in the first or last 1500 bytes, where the descriptions are.
        near = draw(st.integers(0, min(1500, len(content))))
        at = draw(st.sampled_from((near, len(content) - near, draw(st.integers(0, len(content))))))
        what = draw(st.sampled_from(("flip", "put", "insert", "cut", "delete", "repeat")))
        length = draw(st.integers(1, 40))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
        bit = draw(st.integers(0, 7))
        changes.append((what, at, length, piece, bit))
        if what == "flip" and at < len(content):
            content[at] ^= 1 << bit
        elif what in ("put", "insert"):
            content[at : at + (len(piece) if what == "put" else 0)] = piece
        elif what == "cut":
            del content[at:]
        elif what == "delete":
            del content[at : at + length]
        elif what == "repeat":
            content[at:at] = content[at : at + length]
    return Mutation(name, bytes(content), changes)


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


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there")
@pytest.mark.timeout(3600)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 40, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(mutation=mutated())
def test_a_damaged_file_is_read_or_refused_by_name(mutation, folder):
    path = folder / mutation.name
    path.write_bytes(mutation.content)
    reset_peak()
    before, start = memory("VmRSS"), time.process_time()
    try:
        diagnosis = bn.inspect(path)
    except (CheckpointError, OSError) as error:
        assert str(path) in str(error)  # noqa: PT017 (most examples are read or refused)
    else:
        json.loads(diagnosis.to_json())
        assert str(diagnosis).startswith(str(path))
    assert time.process_time() - start < 10
    size = max(len(mutation.content), len(ORIGINALS["a.safetensors"]))
    assert memory("VmHWM") - before <= 2 * size + hostile.SPARE
