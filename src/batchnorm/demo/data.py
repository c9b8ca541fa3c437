"""Images to train on: scikit-learn's bundled digits, or a folder of IDX files.

Shapes: images (N, 1, H, W) float32, labels (N,) int64. Pixels are shifted and scaled by one mean
and one standard deviation of the training images, so that inputs suit all networks.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import BatchNormError

IMAGES_MAGIC = 0x00000803
LABELS_MAGIC = 0x00000801
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class DataError(BatchNormError, ValueError):
    """Image files are missing, damaged, or not what their names say."""


@dataclass(frozen=True)
class Images:
    """Training images, and held-out images."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """How many different labels there are."""
        return int(torch.cat([self.train_labels, self.test_labels]).max()) + 1


LEARN, HOLD_OUT = 3000, 500


def load_images(folder: Path | None) -> Images:
    """The IDX files in ``folder``, or the bundled digits where it is None.

    Raises:
        DataError: If a file is missing, damaged, or of another kind.
    """
    return load_digits() if folder is None else load_idx(folder)


def load_digits() -> Images:
    """Return 1797 digits of 8 by 8 pixels, in a fixed random order, a fifth of them held out."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images, labels = np.asarray(bunch.images), np.asarray(bunch.target)
    # Neighbours in the file come from the same writer, hence the shuffle. It does not depend on
    # the user's seed: runs of different seeds are then tested on the same images.
    order = np.random.default_rng(0).permutation(len(images))
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    return _images("handwritten digits", images, labels, kept, held_out)


def load_idx(folder: Path) -> Images:
    """The four files of the MNIST and Fashion-MNIST format, plain or ``.gz``.

    Only the first ``LEARN`` training and ``HOLD_OUT`` test images are used, so that the tour takes
    a minute or two; the page has their numbers.

    Raises:
        DataError: If a file is missing, damaged, or of another kind, or images and labels differ
            in number.
    """
    paths = [_find(folder, name) for name in IDX_NAMES]
    train, train_labels = read_idx_images(paths[0]), read_idx_labels(paths[1])
    test, test_labels = read_idx_images(paths[2]), read_idx_labels(paths[3])
    _check_pair(paths[0], train, paths[1], train_labels)
    _check_pair(paths[2], test, paths[3], test_labels)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"training images are {_size(train)} and test images {_size(test)}: "
            f"{paths[0]} and {paths[2]} must come from the same data set"
        )
    images, labels = np.concatenate([train, test]), np.concatenate([train_labels, test_labels])
    kept, held_out = np.arange(len(train)), np.arange(len(train), len(images))
    return _images(folder.resolve().name, images, labels, kept[:LEARN], held_out[:HOLD_OUT])


def read_idx_images(path: Path) -> np.ndarray:
    """The images of one IDX file: (N, H, W), uint8."""
    return _read(path, IMAGES_MAGIC, axes=3)


def read_idx_labels(path: Path) -> np.ndarray:
    """The labels of one IDX file: (N,), uint8."""
    return _read(path, LABELS_MAGIC, axes=1)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    there = "exists" if folder.is_dir() else "does not exist"
    raise DataError(
        f"no {name} or {name}.gz in {folder} (which {there}); the folder must hold the four files "
        f"{', '.join(IDX_NAMES)}, each plain or .gz, as MNIST and Fashion-MNIST are published"
    )


def _read(path: Path, magic: int, axes: int) -> np.ndarray:
    raw = _bytes(path)
    head = 4 + 4 * axes
    if len(raw) < head:
        raise DataError(f"{path} has {len(raw)} bytes, fewer than the {head} of an IDX head")
    found, *shape = struct.unpack(f">{1 + axes}I", raw[:head])
    if found != magic:
        raise DataError(
            f"{path} begins with the number 0x{found:08x}, but a file of "
            f"{'images' if axes == 3 else 'labels'} begins with 0x{magic:08x}{_hint(found)}"
        )
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - head != expected:
        raise DataError(
            f"{path} says it holds {' x '.join(map(str, shape))} = {expected} bytes of data, but "
            f"{len(raw) - head} follow its head: it is damaged or cut short; fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape)


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); fetch it again") from error


def _hint(found: int) -> str:
    if found in (IMAGES_MAGIC, LABELS_MAGIC):
        return ": images and labels seem to be exchanged"
    return ": this is not an IDX file of unsigned bytes"


def _check_pair(images: Path, pixels: np.ndarray, labels: Path, marks: np.ndarray) -> None:
    if len(pixels) != len(marks) or len(marks) == 0:
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} {len(marks)} labels; there must be "
            "as many labels as images, and at least one"
        )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[2]}"


def _images(
    name: str, pixels: np.ndarray, labels: np.ndarray, kept: np.ndarray, held_out: np.ndarray
) -> Images:
    images = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1)
    marks = torch.from_numpy(labels.astype(np.int64))
    deviation, mean = torch.std_mean(images[kept].double())
    # If all images are equal, the deviation is 0, and the images are not scaled.
    images = ((images - mean) / (deviation if deviation > 0 else 1)).float()
    return Images(name, images[kept], marks[kept], images[held_out], marks[held_out])
