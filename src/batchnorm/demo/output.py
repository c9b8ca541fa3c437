"""The files the demo leaves: weights, numbers, and the page that shows them."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save

from batchnorm.demo.page import to_report
from batchnorm.demo.tour import Run, Tour
from batchnorm.files import write_atomically
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json

PAGE, NUMBERS = "report.html", "report.json"


def write_results(tour: Tour, folder: Path) -> tuple[Path, ...]:
    """Write everything; no file is ever there in part. The page comes last and first in the result.

    Raises:
        OSError: If the folder is not there, or cannot be written to.
    """
    runs = dict(_runs(tour))
    contents = {name: _weights(run, tour) for name, run in runs.items()}
    report = to_report(tour, tuple(runs))
    page, numbers = to_html(report), to_json(report)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    write_atomically(folder / NUMBERS, numbers)
    write_atomically(folder / PAGE, page)
    return tuple(folder / name for name in (PAGE, NUMBERS, *runs))


def _runs(tour: Tour) -> Iterator[tuple[str, Run]]:
    for study in tour.studies:
        yield f"{study.activation}-with-bn.safetensors", study.normalized
        yield f"{study.activation}-without-bn.safetensors", study.plain


def _weights(run: Run, tour: Tour) -> bytes:
    about = {
        "data": tour.data_name,
        "seed": tour.options.seed,
        "steps": tour.options.steps,
        "batch_size": tour.options.batch_size,
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    return save(run.weights, metadata={"demo": json.dumps(about)})
