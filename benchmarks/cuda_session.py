"""All measurements and tests that need a GPU, in calls of less than ten minutes.

    PYTHONPATH=src OUT=first python benchmarks/cuda_session.py
    PYTHONPATH=src OUT=second python benchmarks/cuda_session.py --parts compiled sweep more

Needs torch, triton and numpy, and neither the native module nor other packages. Parts run
in order of what matters and one that fails does not end the rest; none is begun after --minutes.
Every line is written to a file before the next is measured, and what is aimed at comes last; for
both calls together: python benchmarks/cuda_goals.py first second

    correct    every operation against plain PyTorch in float64, and the bound on statistics
    bits       the same bits again, and on another stream
    graph      a training step captured in a CUDA graph and replayed
    large      more elements than 32 bits address
    cells      BN, BN+ReLU, BN+add+ReLU on ResNet-50's shapes, batch 256, bf16 -> cells.csv
    networks   a training step of ResNet-50 and an EfficientNet-like net, and its peak memory, as
               it is, converted, with save_memory, and by torch.compile -> networks.csv
    compiled   the largest of them beside torch.compile, default and max-autotune -> compiled.csv
    sweep      the constants of ops/backends/triton/plan.py, one at a time -> sweep.csv
    more       evaluation, contiguous and fp32 cells -> more.csv

The Triton kernels serve in all of it, by ``bn.use_backend("triton")``; "eager" is torch.nn.

Without a GPU, ``TRITON_INTERPRET=1 ... --device cpu --tiny`` walks the same code on tiny tensors,
which shows that it runs and nothing else.

For the sanitizer, where it is installed:

    compute-sanitizer --tool memcheck python benchmarks/cuda_session.py --parts correct --tiny
    compute-sanitizer --tool racecheck python benchmarks/cuda_session.py --parts correct --tiny
"""

import argparse
import csv
import io
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import batchnorm as bn
from batchnorm.files import write_atomically
from batchnorm.memory import recipe
from batchnorm.ops.backends.triton import cuda

sys.path.insert(0, str(Path(__file__).parent))
import cuda_goals
from cuda_cells import cells, compiled, more, sweep
from cuda_checks import bits, correct, graph, large
from cuda_networks import networks

# Parts that write their rows themselves.
ROWS = ("cells", "compiled", "more")
Options = argparse.Namespace

# Parts in order of importance; those of SECOND are for a second call.
FIRST = {part.__name__: part for part in (correct, bits, graph, large, cells, networks)}
SECOND = {part.__name__: part for part in (compiled, sweep, more)}
PARTS = FIRST | SECOND


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(name: str, options: Options) -> bool:
    """Run a part; print and write each line as soon as it is measured."""
    print(f"== {name}", flush=True)
    found: list[dict[str, Any]] = []
    try:
        for line in PARTS[name](options):
            print("  ", ", ".join(f"{k} {shown(v)}" for k, v in line.items()), flush=True)
            found.append(line)
            if name not in ROWS:
                write(options.out / f"{name}.csv", found)
        done = True
    except Exception:  # noqa: BLE001 - the session goes on with the next part
        done = False
        traceback.print_exc(limit=8)
    print(f"   {name}: {'done' if done else 'FAILED'}, {options.elapsed():.0f} s", flush=True)
    return done


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write all lines measured so far, since a session may be cut off at any moment."""
    text = io.StringIO()
    fields = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "cuda-session")))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(FIRST))
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after that")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny tensors, to see that it runs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu --tiny walks "
                     "through the code with TRITON_INTERPRET=1")  # fmt: skip
    if options.device == "cpu" and not cuda.interprets():
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    started = time.perf_counter()
    options.elapsed = lambda: time.perf_counter() - started
    options.over = lambda share: options.elapsed() > share * options.minutes * 60
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:  # recompute small results too
        recipe.SMALLEST_BYTES = 0
    for key, value in bn.env().items():
        print(key, value)
    torch.backends.cudnn.benchmark = True
    failed = []
    with bn.use_backend("triton"):
        for name in options.parts:
            if options.over(1.0):
                print(f"== {name}: no time left")
                failed.append(name)
            elif not run_part(name, options):
                failed.append(name)
    cuda_goals.tell([options.out])
    print("failed:", ", ".join(failed) or "nothing")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
