"""The whole demo in one call."""

from pathlib import Path

from batchnorm.demo.data import load_images
from batchnorm.demo.output import write_results
from batchnorm.demo.tour import Tour, take_tour
from batchnorm.demo.training import Options
from batchnorm.files import make_folder
from batchnorm.progress import Watch


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
