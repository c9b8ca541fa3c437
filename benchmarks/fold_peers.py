"""Random graphs through other tools that fold batch normalizations: counts as rows of data.

    python benchmarks/fold_peers.py                 # 200 graphs, by every tool that has no row yet
    python benchmarks/fold_peers.py --tool torchao

The graphs are those of ``fold_graphs.py`` with layers of torch.nn only, in float32; a row is a
chunk of 20. A tool is given the model in eval mode and an example. A graph that it cannot trace or
export, or that raises afterwards, has crashed, and its normalizations are left. A result is wrong
if an output differs from the model's by more than a thousandth of its largest value. ``torchao``
and ``onnxruntime`` with ``onnxscript`` are needed.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from random_graphs import graph
from row_files import append, read

ROWS = Path(__file__).parent / "data" / "fold" / "peers.csv"
FIRST = 2_000_000
WRONG = 1e-3
CHUNK = 20

Result = tuple[list[Tensor], int, int]  # outputs, and numbers of normalizations before and after


def ours(model: nn.Module, x: Tensor) -> Result:
    done = bn.fold(model, x)
    folded, left = len(done.report.folded), len(done.report.left)
    return outputs(model(x)), folded + left, left


def fx(model: nn.Module, x: Tensor) -> Result:
    from torch.fx.experimental.optimization import fuse

    def count(traced: torch.fx.GraphModule) -> int:
        modules = dict(traced.named_modules())
        calls = [n for n in traced.graph.nodes if n.op == "call_module"]
        functions = [n for n in traced.graph.nodes if n.target is nn.functional.batch_norm]
        return len(functions) + sum(isinstance(modules[n.target], _BatchNorm) for n in calls)

    before = count(torch.fx.symbolic_trace(model))
    fused = fuse(model)
    return outputs(fused(x)), before, count(fused)


def torchao(model: nn.Module, x: Tensor) -> Result:
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

    def count() -> int:
        return sum("batch_norm" in str(node.target) for node in exported.graph.nodes)

    exported = torch.export.export(model, (x,)).module()
    before = count()
    _fuse_conv_bn_(exported)
    _fuse_linear_bn_(exported)
    exported.recompile()
    return outputs(exported(x)), before, count()


def onnxruntime(model: nn.Module, x: Tensor) -> Result:
    import onnx
    import onnxruntime as ort
    from onnxscript import optimizer

    def count(path: Path) -> int:
        return sum(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)

    with tempfile.TemporaryDirectory() as folder:
        plain, optimized = Path(folder) / "plain.onnx", Path(folder) / "optimized.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False)
        # The exporter's own optimizer would fold before onnxruntime sees the graph.
        optimizer.fold_constants(exported.model)
        exported.save(plain)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        # Higher levels turn normalizations that they do not fold into depthwise convolutions.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 4
        session = ort.InferenceSession(plain, options)
        name = session.get_inputs()[0].name
        found = session.run(None, {name: x.numpy()})
        return [torch.from_numpy(y) for y in found], count(plain), count(optimized)


TOOLS: dict[str, Callable[[nn.Module, Tensor], Result]] = {
    "batchnorm": ours, "fx.fuse": fx, "torchao": torchao, "onnxruntime": onnxruntime,
}  # fmt: skip


def outputs(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def version(tool: str) -> str:
    if tool == "batchnorm":
        return bn.__version__
    return importlib.metadata.version("torch" if tool == "fx.fuse" else tool)


def measure(tool: str, first: int) -> dict[str, object]:
    """Return the counts of a tool for a chunk of seeds."""
    counts = dict.fromkeys(("normalizations", "legal", "folded", "left", "wrong", "crashed"), 0)
    for seed in range(first, first + CHUNK):
        one = graph(seed, torch_only=True)
        total = len(one.legal) + len(one.illegal)
        counts["normalizations"] += total
        counts["legal"] += len(one.legal)
        expected = outputs(copy.deepcopy(one.model)(one.x))
        try:
            found, before, after = TOOLS[tool](one.model, one.x)
        except Exception as error:  # noqa: BLE001 (any exception of another library)
            print(f"{tool} {seed}: {type(error).__name__}: {str(error)[:100]!r}", flush=True)
            counts["crashed"] += 1
            counts["left"] += total
            continue
        counts["folded"] += before - after
        counts["left"] += total - (before - after)
        off = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            for a, b in zip(expected, found, strict=True)
        )
        counts["wrong"] += not off <= WRONG
    what = {"tool": tool, "version": version(tool), "first": first, "graphs": CHUNK}
    return {**what, **counts, **circumstances()}


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for tool in [options.tool] if options.tool else TOOLS:
        for first in range(FIRST, FIRST + options.graphs, CHUNK):
            known = {(row["tool"], row["first"]) for row in read(options.rows)}
            if (tool, str(first)) not in known:
                row = measure(tool, first)
                append(options.rows, row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
