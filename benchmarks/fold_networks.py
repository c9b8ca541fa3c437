"""Twenty networks folded by ``bn.fold``, ``fx.fuse`` and onnxruntime: rows of data.

    python benchmarks/fold_networks.py              # every network that has no row yet
    python benchmarks/fold_networks.py --only LeViT

A row has how many batch normalizations there are and are left, the reasons, and the errors of the
float32 outputs of the unfolded and of the folded model against the unfolded one in float64: root
mean square over all outputs of eight inputs, relative. What a peer leaves is counted only where its
result is right (within a thousandth of the largest value); otherwise the cell says why not.
"""

import argparse
import copy
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.models.trees import tensors_in
from batchnorm.models.walk import kind_of
from fold_peers import WRONG, fx, onnxruntime
from networks_to_fold import NETWORKS, build
from row_files import append, read

ROWS = Path(__file__).parent / "data" / "fold" / "networks.csv"
INPUTS = 8


def results(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.cat([t.flatten() for t in tensors_in(model(x))]) for x in inputs]


def error(exact: list[Tensor], own: list[Tensor]) -> float:
    off = sum(float((a - b.double()).square().sum()) for a, b in zip(exact, own, strict=True))
    return (off / sum(float(a.square().sum()) for a in exact)) ** 0.5


def peer(tool: object, model: nn.Module, x: Tensor) -> str:
    """Return how many normalizations a tool leaves, or "fails" or "wrong"."""
    with torch.no_grad():
        expected = list(tensors_in(copy.deepcopy(model)(x)))
    try:
        found, _, left = tool(copy.deepcopy(model), x)
        found = list(tensors_in(found))
        off = max(
            float((a - b).abs().max() / a.abs().max())
            for a, b in zip(expected, found, strict=False)
        )
    except Exception as raised:  # noqa: BLE001 (any exception of another library)
        print(f"  {type(raised).__name__}: {str(raised)[:150]!r}", flush=True)
        return "fails"
    return str(left) if off <= WRONG else "wrong"


def measure(name: str) -> dict[str, object]:
    """Return the row of a network."""
    model, x = build(name)
    inputs = [x, *(torch.randn_like(x) for _ in range(INPUTS - 1))]
    total = len({m for m in model.modules() if kind_of(m) is not None})
    exact = results(copy.deepcopy(model).double(), [x.double() for x in inputs])
    unfolded = error(exact, results(model, inputs))
    peers = {"fx": peer(fx, model, x), "onnxruntime": peer(onnxruntime, model, x)}
    done = bn.fold(model, x)
    folded = error(exact, results(model, inputs))
    left = len(done.report.left)
    reasons = sorted({reason.partition(";")[0] for reason in done.report.left.values()})
    return {
        "network": name,
        "norms": total,
        "left": left,
        "left_fx": peers["fx"],
        "left_onnxruntime": peers["onnxruntime"],
        "error_unfolded": f"{unfolded:.3e}",
        "error_folded": f"{folded:.3e}",
        "ratio": f"{folded / unfolded:.3f}",
        "kept_bytes": done.report.kept,
        "reasons": " | ".join(reasons[:4]),
        **circumstances(),
    }


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for name in options.only:
        if name not in {row["network"] for row in read(options.rows)}:
            row = measure(name)
            append(options.rows, row)
            print({key: row[key] for key in list(row)[:9]}, flush=True)


if __name__ == "__main__":
    main()
