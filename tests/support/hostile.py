"""Malicious and damaged files, and a child process that measures time and memory of reading each."""

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save

import batchnorm as bn
from batchnorm.errors import BatchNormError
from support import processes, trained
from support.command import SOURCE

SPARE = 64 << 20


class Code:
    """An object whose unpickling calls ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def zipped(path, data, members=(), compress=zipfile.ZIP_STORED):
    """Write an archive as ``torch.save`` does, with ``data`` as its pickle."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in (
            ("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), *members,
        ):  # fmt: skip
            archive.writestr(f"archive/{name}", content)


def with_header(path, header, tail=b""):
    """Write a safetensors file with the given header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tail)


def tensor(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def many_layers(count):
    """Return the state dict of ``count`` layers with one channel each."""
    state = {}
    for i in range(count):
        values = {
            "running_mean": 0.5,
            "running_var": -1.0 if i % 2 else 2.0,
            "weight": 1.0,
            "bias": 0.0,
        }
        state |= {f"layers.{i}.{name}": torch.full((1,), value) for name, value in values.items()}
        state[f"layers.{i}.num_batches_tracked"] = torch.tensor(3)
    return state


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _text(text):
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _storage_of(numel):
    """Return a pickle of one tensor whose storage declares ``numel`` values."""
    plain = io.BytesIO()
    torch.save({"bn.running_mean": torch.ones(4)}, plain)
    with zipfile.ZipFile(plain) as archive:
        data = archive.read("archive/data.pkl")
    changed = data.replace(b"K\x04tq", b"J" + struct.pack("<i", numel) + b"tq", 1)
    assert changed != data
    return changed


def write_all(folder, layers, large):
    """Write every file; return name -> (path, pattern of the error message, None if it is readable).

    ``large``: also write files of 20 MB and more, some of them decompression bombs.
    """
    state = trained.state("convolutional")
    files = {}

    def file(name, words):
        files[name] = (folder / name, words)
        return folder / name

    for ending, content in (
        ("safetensors", save(state)),
        ("pt", saved(state)),
        ("pth", _old(state)),
    ):
        for share in (0.02, 0.5, 0.98):
            path = file(f"cut at {share}.{ending}", "damaged|cannot be read")
            path.write_bytes(content[: int(len(content) * share)])
        file(f"empty.{ending}", "is empty").write_bytes(b"")
        file(f"noise.{ending}", "not a checkpoint|safetensors").write_bytes(os.urandom(5000))

    _archives(file)
    _pickles(file, folder)
    _headers(file, state)
    if large:
        _large(file)
    _indexes(file, state)
    for name, words, content in (
        ("no layers.pt", None, {"weight": torch.ones(3)}), ("nothing.pt", None, {}),
        ("empty list.pt", None, []), ("text.pt", "no state dict", "text"),
        ("a tensor.pt", "no state dict", torch.ones(3)),
        ("many layers.pt", None, many_layers(layers)),
    ):  # fmt: skip
        torch.save(content, file(name, words))
    file("many layers.safetensors", None).write_bytes(save(many_layers(layers)))
    os.mkfifo(file("pipe.pt", "not a regular file"))
    return files


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def _old(state):
    return saved(state, _use_new_zipfile_serialization=False)


def _large(file):
    """Small archives that decompress to large ones, and headers and pickles of many MB."""
    zeros, plain = b"\0" * (128 << 20), pickle.dumps({}, protocol=2)
    deflated = zipfile.ZIP_DEFLATED
    zipped(file("bomb.pt", "compressed"), plain, [("data/0", zeros)], deflated)
    zipped(file("bomb in the pickle.pt", "compressed"), plain + zeros, (), deflated)
    objects, long = b"\x80\x02(" + b"}" * (8 << 20), b"\x80\x02" + b"N0" * (20 << 20)
    zipped(file("many objects.pt", "far more objects"), objects + b"t.")
    zipped(file("long pickle.pt", "not a checkpoint|far more"), long + b"N.")
    with_header(file("huge.safetensors", "its header has"), b" " * (40 << 20))
    with_header(file("spaces.safetensors", "safetensors"), b" " * (30 << 20))


def _archives(file):
    """Archives with false declarations of their content, and archives of other programs."""
    plain = pickle.dumps({}, protocol=2)
    zipped(file("compressed.pt", "compressed"), plain, (), zipfile.ZIP_DEFLATED)
    path = file("declared size.pt", "damaged|longer")
    zipped(path, plain, [("data/0", b"\0" * 64)])
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(raw)
    zipped(file("declared values.pt", None), _storage_of(1 << 30), [("data/0", b"\0" * 16)])
    zipped(file("no storage.pt", "damaged"), _storage_of(4))
    members = {
        ("word.pt", "without data.pkl"): ["word/document.xml"],
        ("other archive.pt", "TorchScript"): [
            f"archive/{name}" for name in ("data.pkl", "constants.pkl", "code/__torch__.py")
        ],
    }
    for (name, words), names in members.items():
        with zipfile.ZipFile(file(name, words), "w") as archive:
            for member in names:
                archive.writestr(member, plain)


def _pickles(file, folder):
    """Pickles that call functions, and pickles that nest or expand without limit."""
    one = [(f"l{i}.running_{part}", torch.ones(1)) for i in range(40) for part in ("mean", "var")]
    expanded = {name: value.expand(1 << 20) for name, value in one}
    torch.save(expanded, file("expanded.pt", "more than their memory"))
    torch.save(torch.nn.Linear(2, 2), file("a module.pt", r"would call torch\.nn\.modules"))
    code = pickle.dumps({"bn.running_mean": Code(f"touch '{folder / 'ran'}'")}, protocol=2)
    magic = _old({})[: len(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))]
    file("code.pth", "would call posix.system").write_bytes(magic + code * 4)
    slow = _global("_codecs", "encode") + _text("ü" * 400_000) + _text("Puny_Code") + b"\x86R."
    big = _global("builtins", "bytearray") + b"\x8a\x05" + b"\0\0\0\0\x20" + b"\x85R."
    doubled = b"}q\x00" + b"".join(
        b"}(" + _text("a") + b"h%c" % i + _text("b") + b"h%cuq%c" % (i, i + 1) for i in range(60)
    )
    pickles = {
        "code.pt": ("would call posix.system", code),
        "code of protocol 4.pt": ("STACK_GLOBAL", pickle.dumps(Code("true"), protocol=4)),
        "bytearray.pt": ("would call builtins.bytearray", b"\x80\x02" + big),
        "slow codec.pt": ("codecs.encode", b"\x80\x02" + slow),
        "text without end.pt": ("damaged", b"\x80\x02X\xff\xff\xff\x7fabc"),
        # Python warns about unknown escapes, and warnings are errors here.
        "text with escapes.pt": ("damaged", b"\x80\x02S'\\q'\n."),
        "doubled 60 times.pt": (None, b"\x80\x02" + doubled + b"."),
        "deep.pt": (None, b"\x80\x02" + b"(" * 1000 + b"}" + b"t" * 1000 + b"."),
        "inside itself.pt": (None, b"\x80\x02}q\x00" + _text("a") + b"h\x00s."),
    }
    for name, (words, data) in pickles.items():
        zipped(file(name, words), data)


def _headers(file, state):
    """Safetensors files with invalid or unusual headers."""
    file("length.safetensors", "declares").write_bytes(
        (1 << 62).to_bytes(8, "little") + save(state)[8:]
    )
    mean, var = "a.running_mean", "a.running_var"
    odd = {mean: tensor("F4", [8], 0, 4), var: tensor("F8_E8M0", [4], 4, 8)}
    escape = "\x1b[2J\n.running_"
    escapes = {f"{escape}mean": tensor("F32", [1], 0, 4), f"{escape}var": tensor("F32", [1], 4, 8)}
    headers = {
        "nested": ("safetensors", b'{"a":' * 100_000, b""),
        "beyond": ("safetensors", {mean: tensor("F32", [1 << 28], 0, 1 << 30)}, b""),
        "overflow": ("safetensors", {mean: tensor("F32", [1 << 62, 8], 0, 8)}, b""),
        "negative": ("safetensors", {mean: tensor("F32", [-1], 0, 4)}, b""),
        "dtypes": (
            None,
            {mean: tensor("I8", [8], 0, 8), var: tensor("BOOL", [8], 8, 16)},
            b"\1" * 16,
        ),
        "odd dtypes": (None, odd, b"\1" * 8),
        "escapes": (None, escapes, struct.pack("<ff", 1, -1)),
    }
    for name, (words, header, tail) in headers.items():
        with_header(file(f"{name}.safetensors", words), header, tail)


# Paths that lead out of the folder of an index.
OUTSIDE = (
    "/etc/passwd", "../secret.safetensors", "a/../../b", "C:\\x.safetensors", "..\\x",
    "\\\\h\\x", "a\0b", "",
)  # fmt: skip


def _indexes(file, state):
    """Indexes that refer to files outside of their folder, and malformed indexes."""
    file("shard.safetensors", None).write_bytes(save(state))
    where = dict.fromkeys(state, "shard.safetensors")
    first = next(iter(where))
    gone = {"bn.running_mean": "gone.bin", "bn.running_var": "gone.bin"}
    maps = {
        f"leaves {n}": (where | {first: OUTSIDE[n]}, "outside of its folder")
        for n in range(len(OUTSIDE))
    }
    maps |= {
        "gone": (where | gone, "not in"),
        "wrong": (where | {"bn.running_mean": "shard.safetensors"}, "no such tensor"),
        "fifo": (dict.fromkeys(where, "pipe.pt"), "not in"),
        "numbers": (dict.fromkeys(where, 3), "not an index"),
        "list": ([1], "not an index"),
        "plain": (where, None),
        "itself": (dict.fromkeys(where, "itself.index.json"), "which is an index"),
    }
    for name, (content, words) in maps.items():
        file(f"{name}.index.json", words).write_text(json.dumps({"weight_map": content}))
    file("text.index.json", "not JSON").write_text("{")
    file("deep.index.json", "not JSON").write_text("[" * 100_000)


def judge(path, inspected=lambda: None):
    """Return whether a file is read, refused or crashes the reader; the message; the CPU seconds.

    ``inspected`` is called after ``bn.inspect``, before the findings are formatted as text.
    """
    start = time.process_time()
    try:
        found = bn.inspect(path)
        inspected()
        outcome, message = "read", str(found)
        json.loads(found.to_json())
    except (BatchNormError, OSError) as error:
        outcome, message = "refused", str(error)
    except BaseException as error:  # noqa: BLE001 (tests check for crashes)
        outcome, message = "crashed", f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "message": message, "seconds": time.process_time() - start}


CHILD = r"""
import json, os, resource, sys
import batchnorm as bn
from support.hostile import judge

def seen(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

judge(sys.argv[1])
for path in json.load(sys.stdin):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"outcome": f"died with status {status}", "message": "", "grown": 0, "seconds": 0}), flush=True)
        continue
    resource.setrlimit(resource.RLIMIT_AS, (seen("VmSize") + int(sys.argv[2]),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]),) * 2)
    open("/proc/self/clear_refs", "w").write("5")
    before, peaks = seen("VmHWM"), []
    result = judge(path, lambda: peaks.append(seen("VmHWM")))
    grown = min([*peaks, seen("VmHWM")]) - before
    print(json.dumps({**result, "grown": grown}), flush=True)
    os._exit(0)
"""


def judged(paths, good, room=512 << 20, seconds=10):
    """Judge each file in a child process with ``seconds`` of CPU time and ``room`` more bytes of address space."""
    places = {**os.environ, "PYTHONPATH": os.pathsep.join((SOURCE, str(Path(__file__).parents[1])))}
    command = [sys.executable, "-c", CHILD, str(good), room, seconds]
    with processes.started(command, stdin=-1, env=places) as child:
        out, errors = child.communicate(json.dumps([str(path) for path in paths]), timeout=280)
    assert child.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]
