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


def timed(cell):
    """A row with numbers that follow from its cell."""
    number = zlib.crc32(repr(sorted(cell.items())).encode()) % 200 / 100
    times = {"median": 0.1 + number, "p20": 0.09 + number, "p80": 0.12 + number}
    ends = {"ratio": 1 + number, "low": 0.95 + number, "high": 1.05 + number}
    return {**cell, **times, **ends, "pairs": "7", **AROUND}


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
    for cell in nets.NETWORKS:
        for contender, regime in itertools.product(CONTENDERS, tables.REGIMES):
            yield network(cell, contender, regime)
    for contender in CONTENDERS:
        yield network(nets.SAVING[1], contender, "kept")
        for cell, threads in nets.MORE:
            yield network(cell, contender, "kept") | {"threads": threads}
    for cell, contender in itertools.product(nets.COMPILED, COMPILED):
        yield network(cell, contender, "kept") | {"base": "compile"}


def ablation():
    for cell in nets.ABLATED:
        for contender, regime in itertools.product(nets.PARTS, tables.REGIMES):
            yield network(cell, contender, regime)
    for (net, mode, layout, _), contender in itertools.product(
        nets.ABLATED, ("eager", "layers", "converted")
    ):
        if layout == "nchw":
            for threads, dtype in (("1", "bf16"), ("2", "fp32")):
                yield network((net, mode, layout, dtype), contender, "kept") | {"threads": threads}


def inside():
    for layout, contender in itertools.product(("nchw", "channels_last"), ("eager", "graph")):
        for what in ("normalization, addition, activation", "training step"):
            cell = {"what": what, "network": "resnet50", "layout": layout, "regime": "kept"}
            cell |= {"batch": "8", "size": "160"}
            yield timed(cell | {"contender": contender, "base": "eager"})


def cpu():
    for mode, op, dtype, shape, layout in layers.CELLS:
        for contender in ("eager", "eager in place", "ours", "compile"):
            for regime in tables.REGIMES:
                cell = {
                    "op": op, "mode": mode, "dtype": dtype, "shape": shape, "layout": layout,
                    "contender": contender, "regime": regime,
                }  # fmt: skip
                yield timed(cell) | {"copy": "0.01", "floor_copies": "2.5"}


def fallbacks():
    kinds = [("layer", "bn"), ("layer", "bn+relu"), ("momentum=None", "bn+relu")]
    for (kind, op), dtype, mode in itertools.product(kinds, ("fp32", "bf16"), ("train", "eval")):
        cell = {"world": "no native module", "kind": kind, "op": op, "dtype": dtype}
        yield timed(cell | {"layout": "contiguous", "mode": mode, "regime": "kept"})


def calibration():
    for network, contender in itertools.product(("resnet50", "mobilenet_v2"), ("off", "on")):
        cell = {"network": network, "layout": "nchw", "batch": "16", "size": "224", "batches": "10"}
        yield timed(cell | {"contender": f"cache {contender}", "regime": "default"})


def statistics_of_use():
    methods = ("running average", "bn.calibrate batch")
    for batch, seed, method in itertools.product(("2", "8"), range(3), methods):
        found = {"accuracy": 0.9 + seed / 100, "loss": 0.3, "distance_batch": 1e-3}
        cell = {"data": "handwritten digits", "batch": batch, "seed": seed, "method": method}
        around = {k: v for k, v in AROUND.items() if k not in ("allocator", "faults")}
        yield {**cell, **found, "distance_population": 2e-3, **around}


THROUGHPUT = [
    ("cnn", "2x1x28x28"),
    ("mlp, 784-512-512-10", "8x784"),
    ("mlp, 64-128-128-10", "8x64"),
]


def throughput():
    for network, shape in THROUGHPUT:
        cell = {"network": network, "shape": shape, "batches": "400", "regime": "default"}
        yield timed(cell) | {"plain_seconds": 0.07, "calibrate_seconds": 0.11}


def accumulation():
    errors = {"first_off": "0.3", "median_off": "0.2"}
    for way in ("whole, torch.nn", "micro-batches, torch.nn"):
        cell = {"network": "resnet18", "image": "64", "batch": "64", "way": way, "regime": "kept"}
        times = {"step_s": "0.5", "ratio": "1.0", "low": "0.9", "high": "1.1"}
        yield {**cell, "rounds": "7", **times, "peak_bytes": "2e8", **errors, **AROUND}


def fold_networks():
    for name, left in (("ResNet-50", "0"), ("LeViT", "fails")):
        peers = {"left_fx": left, "left_onnxruntime": "wrong"}
        errors = {"error_unfolded": "1e-6", "error_folded": "1e-6", "ratio": "1.000"}
        yield {"network": name, "norms": "53", "left": "0", **peers, **errors, **AROUND}


COUNTS = ("graphs", "legal", "illegal", "folded", "wrong", "crashed", "missed", "trespassed",
          "changed", "left")  # fmt: skip


def fold_graphs():
    yield {"first": "0", **dict.fromkeys(COUNTS, "500"), **AROUND}


def fold_peers():
    for tool in ("batchnorm", "torchao"):
        yield {"tool": tool, "version": "1", "first": "0", **dict.fromkeys(COUNTS, "20"), **AROUND}


def fold_time():
    for network, regime, contender in itertools.product(
        ("resnet50", "mobilenet_v2", "efficientnet_b0"), tables.REGIMES, ("folded", "unfolded")
    ):
        cell = {"network": network, "batch": "4", "size": "160", "regime": regime}
        yield timed(cell | {"contender": contender, "base": "twin"})


def freeze_matrix():
    for contender in ("`bn.freeze`", "another"):
        row = {"action": "`model.train()`", "contender": contender, "outcome": "yes"}
        yield {**row, "version": "1", **AROUND}


def freeze_tune():
    for contender in ("without", "folded"):
        row = {"network": "resnet50", "layout": "nchw", "batch": "4", "size": "160"}
        row |= {"contender": contender, "regime": "kept", "saved_bytes": "1000000"}
        yield {**row, "ratio": "1.0", "low": "0.9", "high": "1.1", **AROUND}


def freeze_gradients():
    for of in ("weight", "gamma", "beta"):
        row = {"network": "resnet50", "contender": "folded", "of": of}
        yield {**row, "error": "1e-6", "ratio": "1.0", **AROUND}


def variants_times():
    for shape, contender in (("(64, 64, 32, 32)", "plain"), ("(4096, 256)", "mask")):
        row = {"shape": shape, "contender": contender, "regime": "kept"}
        yield {**row, "ratio": "1.0", "low": "0.9", "high": "1.1", **AROUND}


def variants_small_batches():
    for source in ("Batch", "Renorm"):
        row = {"data": "digits", "batch": "2", "source": source, "seed": "0", "last": "0.9"}
        yield {**row, **AROUND}


def variants_renorm():
    yield {"library": "keras", "version": "3", "steps": "40", "error": "1e-6", **AROUND}


def variants_padding():
    for padded in ("0", "10"):
        row = {"model": "Wav2Vec2Conformer", "mode": "train", "padded": padded}
        yield {**row, "change": "0.1", "version": "5", **AROUND}


def doctor_faults():
    for rule, found in (("BN201", "yes"), ("BN501", "no")):
        words = {"false": "BN204", "mended": found, "torch-audit": "TA101"}
        yield {"rule": rule, "network": "mlp", "found": found, **words, **AROUND}


def doctor_healthy():
    said = {"layers": "20", "above info": "–", "info": "BN204", "torch-audit": "TA101 TA102"}
    yield {"network": "ResNet-18", **said, **AROUND}


def doctor_published():
    file = {"package": "one", "version": "1", "file": "one.pth", "megabytes": "2.0"}
    yield {**file, "layers": "6", "findings": "info BN204 (1)", **AROUND}


def observing():
    ratios = {"between": "1.0", "window": "1.1", "sampled": "1.2", "default": "1.03"}
    cell = {"network": "resnet18", "image": "32", "batch": "128"}
    yield {**cell, "step_s": "0.2", **ratios, **AROUND}


def synced_errors():
    errors = dict.fromkeys(("y", "dx", "dweight", "dbias", "running_mean", "running_var"), "1e-7")
    for dtype, share in itertools.product(
        ("float64", "float32", "bfloat16", "float16"), ("equal", "unequal", "subgroups")
    ):
        for contender in ("batchnorm", "pytorchvideo"):
            cell = {"contender": contender, "processes": "4", "share": share, "dtype": dtype}
            yield {**cell, **errors, **AROUND}


def synced_steps():
    sent = {"image": "32", "batch": "64", "layers": "20", "messages": "40", "bytes": "200000"}
    for kind in ("torch", "batch", "synced"):
        yield {"kind": kind, **sent, "rounds": "15", "step_s": "0.2", "ratio": "1.1", **AROUND}


def port_parity():
    errors = dict.fromkeys(("outputs", "after_training", "after_training_unbiased"), "1e-7")
    for library in ("keras", "flax"):
        yield {"library": library, "version": "1", "network": "plain", **errors, **AROUND}


def insertion():
    for inserted, steps in itertools.product((False, True), ("", "40")):
        cell = {"network": "MLP", "rate": "0.1", "inserted": inserted, "seed": len(steps)}
        yield {**cell, "steps": steps, "same": "True", **AROUND}


FILES = {
    "networks/rows.csv": networks,
    "networks/inside.csv": inside,
    "history/ablation/rows.csv": ablation,
    "cpu/rows.csv": cpu,
    "fallbacks/rows.csv": fallbacks,
    "calibration/rows.csv": calibration,
    "use/statistics.csv": statistics_of_use,
    "use/throughput.csv": throughput,
    "use/accumulation.csv": accumulation,
    "fold/networks.csv": fold_networks,
    "fold/graphs.csv": fold_graphs,
    "fold/peers.csv": fold_peers,
    "fold/time.csv": fold_time,
    "freeze/matrix.csv": freeze_matrix,
    "variants/times.csv": variants_times,
    "variants/small_batches.csv": variants_small_batches,
    "variants/renorm.csv": variants_renorm,
    "variants/padding.csv": variants_padding,
    "freeze/tune.csv": freeze_tune,
    "freeze/gradients.csv": freeze_gradients,
    "doctor/faults.csv": doctor_faults,
    "doctor/healthy.csv": doctor_healthy,
    "doctor/published.csv": doctor_published,
    "observe/steps.csv": observing,
    "port/parity.csv": port_parity,
    "synced/errors.csv": synced_errors,
    "synced/steps.csv": synced_steps,
    "insert/steps.csv": insertion,
}


def write(folder, names=tuple(FILES)):
    """Write files below a folder."""
    for name in names:
        rows = list(FILES[name]())
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
