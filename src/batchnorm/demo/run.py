"""The whole demo in one call, and the files that it writes: weights, numbers, and the page."""

import json
from pathlib import Path

from safetensors.torch import save

from batchnorm.demo.data import load_images
from batchnorm.demo.repeats import ends
from batchnorm.demo.section_data import data_section, statistics_section
from batchnorm.demo.section_insert import insert_section
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
        f"Batch normalization at work on {tour.data_name} · 批归一化实验",
        (
            *_fast(tour.studies[0]),
            *(words for study in tour.studies for words in _outcome(study)),
            _counts(tour),
        ),
        (
            race_section(tour),
            data_section(tour),
            statistics_section(tour),
            shift_section(tour),
            estimates_section(tour),
            modes_section(tour),
            insert_section(tour),
            _files_section(tour, weight_files),
        ),
    )


def _fast(study: Study) -> tuple[str, str]:
    """The strongest result: the rate at which only the normalized network learns."""
    fast = study.fast
    without, with_bn = ends(fast.plain), ends(fast.normalized)
    name = NAME[study.activation]
    english = (
        f"With {name}, at learning rate {fast.rate:g}: after {fast.plain[0].steps[-1]} steps the "
        f"network without batch normalization is right for {without.spread} of the held-out "
        f"images, with it for {with_bn.spread} ({len(fast.seeds)} seeds)."
    )
    chinese = (
        f"学习率 {fast.rate:g}（{name}）：无 BN 的留出准确率为 {without.spread}，"
        f"有 BN 为 {with_bn.spread}（{len(fast.seeds)} 个种子）。"
    )
    return english, chinese


def _counts(tour: Tour) -> str:
    learn, held_out = tour.train_count, tour.test_count
    return f"{learn} images to learn from, {held_out} held out, seeds from {tour.options.seed}."


def _outcome(study: Study) -> tuple[str, str]:
    """What the long trainings showed, at two levels, in English and Chinese."""
    plain, normalized = study.plain.curve, study.normalized.curve
    without, with_bn = ends(study.best.plain), ends(study.best.normalized)
    name = NAME[study.activation]
    opening = (
        f"With {name}, at the learning rate that suits the network without BN best "
        f"({study.rate:g}): "
    )
    both = [
        f"{level:.0%} is reached in {slow} steps without and {quick} with batch normalization"
        for level in LEVELS_TO_TELL
        if (slow := plain.steps_to(level)) is not None
        and (quick := normalized.steps_to(level)) is not None
    ]
    end = f"the end is {without.spread} without and {with_bn.spread} with."
    chinese = (
        f"在最适合无 BN 网络的学习率 {study.rate:g}（{name}）下："
        f"结束时无 BN 为 {without.spread}，有 BN 为 {with_bn.spread}。"
    )
    return opening + "; ".join([*both[:1], *both[1:][-1:], end]), chinese


def _files_section(tour: Tour, weight_files: tuple[str, ...]) -> Section:
    options = tour.options
    return Section(
        "Files, and how to get these numbers again · 文件与重现",
        (
            Text(
                "Beside this page lie the trained weights, "
                + ", ".join(weight_files)
                + ", and report.json with every number of this page. The weights load into a "
                "network of torch.nn as well as into one of batchnorm:",
                "本页旁边有训练好的权重，以及包含本页全部数字的 report.json。"
                "权重既可载入 torch.nn 的网络，也可载入 batchnorm 的网络：",
            ),
            Formula(f"safetensors.torch.load_file('{weight_files[0]}')"),
            Text(
                "The same command gives the same numbers on the same machine:",
                "同一命令在同一机器上给出相同的数字：",
            ),
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
