"""The whole demo in one call, and the files it leaves: weights, numbers, and the page."""

import json
from pathlib import Path

from safetensors.torch import save

from batchnorm.demo.data import load_images
from batchnorm.demo.page import to_report
from batchnorm.demo.tour import Run, Tour, take_tour
from batchnorm.demo.training import Options
from batchnorm.files import make_folder, write_atomically
from batchnorm.progress import Watch
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json

PAGE, NUMBERS = "report.html", "report.json"


def run_demo(
    data: Path | None, out: Path, options: Options, watch: Watch
) -> tuple[Tour, tuple[Path, ...]]:
    """Take the tour and write what it found.

    Args:
        data: Folder of IDX files; None for the bundled digits.
        out: Folder for the results; made if it is not there.
        options: Seed, steps or epochs, batch size, and K.
        watch: Told how far each stage is.

    Returns:
        What was measured, and the files: the page, the numbers, the weights.

    Raises:
        DataError: If the images cannot be read.
        OptionError: If an option does not fit the data, or ``out`` cannot be made.
        OSError: If a file cannot be written.
    """
    images = load_images(data)
    make_folder(out)
    tour = take_tour(images, options.in_steps(len(images.train_labels)), watch)
    return tour, write_results(tour, out)


def write_results(tour: Tour, folder: Path) -> tuple[Path, ...]:
    """Write everything; no file is ever there in part. The page comes last and first in the result.

    Raises:
        OSError: If the folder is not there, or cannot be written to.
    """
    runs = {
        f"{study.activation}-{kind}-bn.safetensors": run
        for study in tour.studies
        for kind, run in (("with", study.normalized), ("without", study.plain))
    }
    contents = {name: _weights(run, tour) for name, run in runs.items()}
    report = to_report(tour, tuple(runs))
    page, numbers = to_html(report), to_json(report)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    write_atomically(folder / NUMBERS, numbers)
    write_atomically(folder / PAGE, page)
    return tuple(folder / name for name in (PAGE, NUMBERS, *runs))


def _weights(run: Run, tour: Tour) -> bytes:
    about = {
        "data": tour.data_name,
        "seed": tour.options.seed,
        "steps": tour.options.steps,
        "batch_size": tour.options.batch_size,
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    return save(run.weights, metadata={"demo": json.dumps(about)})
