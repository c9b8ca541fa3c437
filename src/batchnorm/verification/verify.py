"""``bn.verify``: the laws of Moments and the bounds on accuracy, checked on a device."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from batchnorm.errors import BackendError, DeviceError
from batchnorm.ops.backends.choice import BACKENDS
from batchnorm.progress import Watch, bars
from batchnorm.report.model import Block, Section, Table, Text
from batchnorm.verification.comparisons import Comparisons, Found, laws, of_backend, selections

CAVEAT = "These checks have been tried on CPUs only."


class Check(NamedTuple):
    """The result of one kind of comparisons.

    Attributes:
        name: Name of the kind.
        comparisons: Number of comparisons.
        worst: The largest error, as a multiple of the allowed error.
        at: The comparison with the largest error.
        skipped: The reason if there were no comparisons, else empty.
    """

    name: str
    comparisons: int
    worst: float
    at: str
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound."""
        return self.worst <= 1


class Verification(NamedTuple):
    """The result of ``bn.verify``.

    Attributes:
        device: The device.
        checks: All kinds of comparisons.
        seconds: Duration.
    """

    device: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def report(self) -> Section:
        """Return a table of the checks, and the verdict."""
        rows = tuple(
            (one.name, one.comparisons, None if one.skipped else one.worst, one.at or one.skipped)
            for one in self.checks
        )
        columns = ("check", "comparisons", "error / allowed", "largest at")
        blocks: list[Block] = [
            Table(f"Checks on {self.device}", columns, rows, digits=2),
            Text(str(self)),
        ]
        if torch.device(self.device).type != "cpu":
            blocks.append(Text(CAVEAT))
        return Section("", tuple(blocks))

    def __str__(self) -> str:
        total = sum(check.comparisons for check in self.checks)
        failed = [check.name for check in self.checks if not check.passed]
        found = f"failed: {', '.join(failed)}" if failed else "all are within their bounds"
        return f"{total} comparisons on {self.device} in {self.seconds:.1f} s: {found}"


def verify(device: torch.device | str = "cpu", *, watch: Watch | None = None) -> Verification:
    r"""Check the laws of Moments and the bounds on accuracy on a device; under a minute.

    Outputs, gradients of input, weight and bias, and running statistics are compared with float64,
    for each backend, dtype, layout and activation, with means of 0 and of 1000 standard deviations;
    also masks, weights and groups of samples, and evaluation. The allowed error is

    .. math:: |y - y_{64}| \le 8 u \Big(1 + \tfrac{|\mu|}{\sigma}\Big) s + (4u + v)\,|y_{64}|

    where u is the unit roundoff of float32 (for float64 inputs that of float64, times the logarithm
    of the count), v that of a narrower dtype, and s the largest factor after the normalization. A
    separate random generator is used.

    Args:
        device: The device to check.
        watch: Shows progress, as yielded by ``batchnorm.progress.bars``; a bar by default.

    Returns:
        The checks and a verdict.

    Raises:
        DeviceError: If the device is not available.
    """
    try:
        place = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"expected a device of this torch, got {device!r}: {reason}") from error
    started = time.monotonic()
    checks: list[Check] = []
    plans: list[tuple[str, Comparisons]] = [
        ("Moments", laws),
        ("masks, weights, groups", selections),
    ]
    plans += [(f'backend "{name}"', of_backend(name)) for name in BACKENDS]
    with bars(watch is None) as shown:
        for done, (name, plan) in enumerate(plans):
            (watch or shown)(f"checking {place}", done, len(plans))
            checks.append(_check(name, plan(place)))
        (watch or shown)(f"checking {place}", len(plans), len(plans))
    return Verification(str(place), tuple(checks), time.monotonic() - started)


def _check(name: str, comparisons: Iterator[Found]) -> Check:
    try:
        found = list(comparisons)
    except BackendError as error:
        return Check(name, 0, 0.0, "", str(error))
    worst = max(found, key=lambda one: one.worst)
    return Check(name, len(found), worst.worst, worst.what)
