"""The whole demo in one call, and the files that it writes: weights, numbers, and the page."""

import json
from pathlib import Path

from safetensors.torch import save

from batchnorm.demo.data import load_images
from batchnorm.demo.section_race import NAME, race_section
from batchnorm.demo.section_shift import shift_section
from batchnorm.demo.section_use import estimates_section, modes_section
from batchnorm.demo.tour import Run, Study, Tour, take_tour
from batchnorm.demo.training import Options
from batchnorm.files import make_folder, write_atomically
from batchnorm.progress import Watch
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json
from batchnorm.report.model import Formula, Report, Section, Text

LEVELS_TO_TELL = (0.8, 0.9, 0.95, 0.97)


def to_report(tour: Tour, weight_files: tuple[str, ...]) -> Report:
    """The whole page. ``weight_files`` are the names of the files beside it."""
    return Report(
        f"Batch normalization at work on {tour.data_name}",
        (
            _counts(tour),
            *(_outcome(study) for study in tour.studies),
        ),
        (
            race_section(tour),
            shift_section(tour),
            estimates_section(tour),
            modes_section(tour),
            _files_section(tour, weight_files),
        ),
    )


def _counts(tour: Tour) -> str:
    learn, held_out = tour.train_count, tour.test_count
    return f"{learn} images to learn from, {held_out} held out, seed {tour.options.seed}."


def _outcome(study: Study) -> str:
    """What the long trainings showed, at two levels: one network may be ahead early, one late."""
    plain, normalized = study.plain.curve, study.normalized.curve
    opening = (
        f"With {NAME[study.activation]}, at the learning rate that suits the network without BN "
        f"best ({study.rate:g}): "
    )
    both = [
        f"{level:.0%} is reached in {slow} steps without and {quick} with batch normalization"
        for level in LEVELS_TO_TELL
        if (slow := plain.steps_to(level)) is not None
        and (quick := normalized.steps_to(level)) is not None
    ]
    end = f"the end is {plain.accuracy[-1]:.1%} without and {normalized.accuracy[-1]:.1%} with."
    return opening + "; ".join([*both[:1], *both[1:][-1:], end])


def _files_section(tour: Tour, weight_files: tuple[str, ...]) -> Section:
    options = tour.options
    return Section(
        "Files, and how to get these numbers again",
        (
            Text(
                "Beside this page lie the trained weights, "
                + ", ".join(weight_files)
                + ", and report.json with every number of this page. The weights load into a "
                "network of torch.nn as well as into one of batchnorm:"
            ),
            Formula(f"safetensors.torch.load_file('{weight_files[0]}')"),
            Text("The same command gives the same numbers on the same machine:"),
            Formula(
                f"batchnorm demo --seed {options.seed} --steps {options.steps} "
                f"--batch-size {options.batch_size} --k {options.k}"
            ),
        ),
    )


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
