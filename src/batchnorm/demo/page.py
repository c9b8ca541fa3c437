"""What the tour measured, as a report in plain words."""

from batchnorm.demo.section_race import NAME, race_section
from batchnorm.demo.section_shift import shift_section
from batchnorm.demo.section_use import estimates_section, modes_section
from batchnorm.demo.tour import Study, Tour
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
