"""Made-up rows for tests, of every file that the pages cite."""

import csv
import itertools
import sys
import zlib
from pathlib import Path

import layers
import tables
import tables_of_networks as nets

AROUND = {
    "allocator": "glibc",
    "faults": "150500",
    "date": "2026-11-28T12:00:00+00:00",
    "commit": "abcdef0",
    "clean": "True",
    "machine": "AMD EPYC",
    "threads": "1",
    "python": "3.11.2",
    "torch": "2.13.0+cpu",
    "code": "0123456789ab",
}


def rows(**columns):
    """Yield a row for each combination of values; a column is a tuple of values or a constant."""
    given = [value if isinstance(value, tuple) else (value,) for value in columns.values()]
    for values in itertools.product(*given):
        yield {**dict(zip(columns, values)), **AROUND}


def timed(cell):
    """Return a row whose numbers are derived from a checksum of its cell."""
    number = zlib.crc32(repr(sorted(cell.items())).encode()) % 200 / 100
    times = {"median": 0.1 + number, "p20": 0.09 + number, "p80": 0.12 + number}
    ends = {"ratio": 1 + number, "low": 0.95 + number, "high": 1.05 + number}
    return {**cell, **times, **ends, "pairs": "7", **AROUND}


def measured(**columns):
    return map(timed, rows(**columns))


def network(cell, contender, regime):
    (name, batch, size), mode, layout, dtype = cell
    row = {
        "network": name, "mode": mode, "layout": layout, "dtype": dtype, "batch": batch,
        "size": size, "regime": regime, "contender": contender, "base": "eager",
    }  # fmt: skip
    numbers = {"saved_bytes": "1319000000", "peak_bytes": "1980000000"}
    return timed(row) | numbers


CONTENDERS = ("eager", "layers", "dynamo", "graph", "save_memory")
COMPILED = ("compile", "compile converted", "graph, inductor")


def networks():
    for cell, contender, regime in itertools.product(nets.NETWORKS, CONTENDERS, tables.REGIMES):
        yield network(cell, contender, regime)
    for contender in CONTENDERS:
        yield network(nets.SAVING[1], contender, "kept")
        for cell, threads in nets.MORE:
            yield network(cell, contender, "kept") | {"threads": threads}
    for cell, contender in itertools.product(nets.COMPILED, COMPILED):
        yield network(cell, contender, "kept") | {"base": "compile"}


def ablation():
    for cell, contender, regime in itertools.product(nets.ABLATED, nets.PARTS, tables.REGIMES):
        yield network(cell, contender, regime)


def cpu():
    for mode, op, dtype, shape, layout in layers.CELLS:
        cell = {"op": op, "mode": mode, "dtype": dtype, "shape": shape, "layout": layout}
        contenders = ("eager", "eager in place", "ours", "compile")
        for row in measured(**cell, contender=contenders, regime=tuple(tables.REGIMES)):
            yield row | {"copy": "0.01", "floor_copies": "2.5"}


def fallbacks():
    same = {
        "world": "no native module", "dtype": ("fp32", "bf16"), "layout": "contiguous",
        "mode": ("train", "eval"), "regime": "kept",
    }  # fmt: skip
    yield from measured(kind="layer", op=("bn", "bn+relu"), **same)
    yield from measured(kind="momentum=None", op="bn+relu", **same)


def statistics_of_use():
    methods = ("running average", "bn.calibrate batch")
    cells = {
        "data": "handwritten digits",
        "batch": ("2", "8"),
        "seed": (0, 1, 2),
        "method": methods,
    }
    errors = {"loss": 0.3, "distance_batch": 1e-3, "distance_population": 2e-3}
    for row in rows(**cells, **errors):
        del row["allocator"], row["faults"]
        yield {**row, "accuracy": 0.9 + row["seed"] / 100}


THROUGHPUT = {"cnn": "2x1x28x28", "mlp, 784-512-512-10": "8x784", "mlp, 64-128-128-10": "8x64"}


def throughput():
    for net, shape in THROUGHPUT.items():
        (row,) = measured(network=net, shape=shape, batches="400", regime="default")
        yield row | {"plain_seconds": 0.07, "calibrate_seconds": 0.11}


def fold_networks():
    errors = {"error_unfolded": "1e-6", "error_folded": "1e-6", "ratio": "1.000"}
    for name, left in (("ResNet-50", "0"), ("LeViT", "fails")):
        yield from rows(network=name, norms="53", left="0", left_fx=left, left_onnxruntime="wrong", **errors)  # fmt: skip


def variants_times():
    for shape, contender in (("(64, 64, 32, 32)", "plain"), ("(4096, 256)", "mask")):
        yield from rows(shape=shape, contender=contender, regime="kept", **INTERVAL)


def doctor_faults():
    for rule, found in (("BN201", "yes"), ("BN501", "no")):
        words = {"false": "BN204", "mended": found, "torch-audit": "TA101"}
        yield from rows(rule=rule, network="mlp", found=found, **words)


INTERVAL = {"ratio": "1.0", "low": "0.9", "high": "1.1"}
COUNTS = ("graphs", "legal", "illegal", "folded", "wrong", "crashed", "missed", "trespassed",
          "changed", "left")  # fmt: skip
SMALL = {"network": "resnet50", "batch": "4", "size": "160"}
ERRORS = dict.fromkeys(("y", "dx", "dweight", "dbias", "running_mean", "running_var"), "1e-7")
PARITY = dict.fromkeys(("outputs", "after_training", "after_training_unbiased"), "1e-7")

FILES = {
    "networks/rows.csv": networks,
    "networks/inside.csv": lambda: measured(
        what=("normalization, addition, activation", "training step"), network="resnet50",
        layout=("nchw", "channels_last"), regime="kept", batch="8", size="160",
        contender=("eager", "graph"), base="eager",
    ),
    "history/ablation/rows.csv": ablation,
    "cpu/rows.csv": cpu,
    "fallbacks/rows.csv": fallbacks,
    "calibration/rows.csv": lambda: measured(
        network=("resnet50", "mobilenet_v2"), layout="nchw", batch="16", size="224", batches="10",
        contender=("cache off", "cache on"), regime="default",
    ),
    "use/statistics.csv": statistics_of_use,
    "use/throughput.csv": throughput,
    "use/accumulation.csv": lambda: rows(
        network="resnet18", image="64", batch="64", way=("whole, torch.nn", "micro-batches, torch.nn"),
        regime="kept", rounds="7", step_s="0.5", **INTERVAL, peak_bytes="2e8", first_off="0.3",
        median_off="0.2",
    ),
    "fold/networks.csv": fold_networks,
    "fold/graphs.csv": lambda: rows(first="0", **dict.fromkeys(COUNTS, "500")),
    "fold/peers.csv": lambda: rows(
        tool=("batchnorm", "torchao"), version="1", first="0", **dict.fromkeys(COUNTS, "20")
    ),
    "fold/time.csv": lambda: measured(
        **(SMALL | {"network": ("resnet50", "mobilenet_v2", "efficientnet_b0")}),
        regime=tuple(tables.REGIMES), contender=("folded", "unfolded"), base="twin",
    ),
    "freeze/matrix.csv": lambda: rows(
        action="`model.train()`", contender=("`bn.freeze`", "another"), outcome="yes", version="1"
    ),
    "variants/times.csv": variants_times,
    "variants/small_batches.csv": lambda: rows(
        data="digits", batch="2", source=("Batch", "Renorm"), seed="0", last="0.9"
    ),
    "variants/renorm.csv": lambda: rows(library="keras", version="3", steps="40", error="1e-6"),
    "variants/padding.csv": lambda: rows(
        model="Wav2Vec2Conformer", mode="train", padded=("0", "10"), change="0.1", version="5"
    ),
    "freeze/tune.csv": lambda: rows(
        **SMALL, layout="nchw", contender=("without", "folded"), regime="kept",
        saved_bytes="1000000", **INTERVAL,
    ),
    "freeze/gradients.csv": lambda: rows(
        network="resnet50", contender="folded", of=("weight", "gamma", "beta"), error="1e-6",
        ratio="1.0",
    ),
    "doctor/faults.csv": doctor_faults,
    "doctor/healthy.csv": lambda: rows(
        **{"network": "ResNet-18", "layers": "20", "above info": "–", "info": "BN204",
           "torch-audit": "TA101 TA102"}
    ),
    "doctor/published.csv": lambda: rows(
        package="one", version="1", file="one.pth", megabytes="2.0", layers="6",
        findings="info BN204 (1)",
    ),
    "observe/steps.csv": lambda: rows(
        network="resnet18", image="32", batch="128", step_s="0.2", between="1.0", window="1.1",
        sampled="1.2", default="1.03",
    ),
    "port/parity.csv": lambda: rows(
        library=("keras", "flax"), version="1", network="plain", **PARITY
    ),
    "synced/errors.csv": lambda: itertools.chain(
        rows(
            dtype=("float64", "float32", "bfloat16", "float16"),
            share=("equal", "unequal", "subgroups"), contender=("batchnorm", "pytorchvideo"),
            processes="4", **ERRORS,
        ),
        rows(
            dtype="float32", share="empty", contender="flax", processes="4",
            **{**ERRORS, "y": "nan"},
        ),
    ),
    "synced/steps.csv": lambda: rows(
        kind=("torch", "batch", "synced"), image="32", batch="64", layers="20", messages="40",
        bytes="200000", rounds="15", step_s="0.2", ratio="1.1",
    ),
    "insert/steps.csv": lambda: rows(
        network="MLP", rate="0.1", inserted=(False, True), seed="0", steps=("", "40"), same="True"
    ),
}  # fmt: skip


def write(folder, names=tuple(FILES)):
    """Write files below a folder."""
    for name in names:
        found = list(FILES[name]())
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
