"""One pass over the data, on every process of a job alike.

Each process reads its own share, of any size. They meet when all shares are read, and with a
target error also in between.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from batchnorm.calibration.pool import GROUPS, Pool, relative_error
from batchnorm.calibration.stage import Stage
from batchnorm.collective import Ranks
from batchnorm.moments import Moments
from batchnorm.progress import Tell

# Batches before a standard error is believed: with fewer it is too uncertain itself.
FEWEST = 8
_DONE, _MORE = "done", "more"


@dataclass
class Tally:
    """What was read.

    Attributes:
        batches: How many batches.
        samples: How many samples.
        rejected: How many batches were left out for values that are not finite.
        where: The first layer that met such values.
    """

    batches: int = 0
    samples: int = 0
    rejected: int = 0
    where: str | None = None


class Measured(NamedTuple):
    """What was measured for one layer: Moments of everything, and of groups of batches (K, C)."""

    moments: Moments
    groups: Moments


@dataclass
class PassResult:
    """What a pass brought, of all processes together.

    Attributes:
        layers: Layer name -> what was measured; without layers that were not used.
        tally: What was read, by all.
        reached: Whether the target error was reached; None where there is none.
    """

    layers: dict[str, Measured]
    tally: Tally
    reached: bool | None = None


@dataclass
class Sweep:
    """A pass over data.

    Attributes:
        stage: The layers.
        pool: Where their Moments go.
        eps: Of every channel in the pool.
        ranks: The processes.
        target: The relative error that ends the pass, or None.
        allow_nan: Whether batches with NaN or infinities are taken.
        tell: Told the samples of every batch, and whom to ask for the error so far.
    """

    stage: Stage
    pool: Pool
    eps: torch.Tensor
    ranks: Ranks
    target: float | None = None
    allow_nan: bool = False
    tell: Tell = lambda samples, error: None  # noqa: ARG005
    tally: Tally = field(default_factory=Tally)
    _next: int = FEWEST

    def run(self, batches: Iterator[tuple[Any, int]], feed: Callable[[Any], None]) -> PassResult:
        """Feed every batch, and return what all processes have found together."""
        self.stage.row = self.pool.row
        reached = None if self.target is None else False
        for batch, samples in batches:
            self._take(batch, samples, feed)
            if self._is_due() and self._meet(_MORE):
                reached = True
                break
        while not reached:
            met = self._meet(_DONE)
            if met is None:
                break
            reached = met
        return self._result(reached)

    def _take(self, batch: Any, samples: int, feed: Callable[[Any], None]) -> None:
        row, tally = self.pool.row, self.tally
        feed(batch)
        row.fetch()
        tally.batches += 1
        if self.allow_nan or row.is_finite():
            self.pool.add()
            tally.samples += samples
        else:
            tally.rejected += 1
            if tally.where is None:
                tally.where = row.where()
            row.clear()
        self.tell(samples, self._error_now)

    def _error_now(self) -> float | None:
        return self._error(self.pool.groups())

    def _is_due(self) -> bool:
        if self.target is None or self.tally.batches < self._next:
            return False
        self._next += max(1, self._next // 8)
        return True

    def _meet(self, word: str) -> bool | None:
        """Return whether the target is reached, None if all are done."""
        words = self.ranks.exchange(word)
        if self.target is not None:
            groups = self._groups()
            error = self._error(groups)
            used = int((groups.count > 0).any(1).sum())  # type: ignore[union-attr, operator]
            if error is not None and used >= FEWEST and error <= self.target:
                return True
        return None if all(said == _DONE for said in words) else False

    def _error(self, groups: Moments) -> float | None:
        error = relative_error(groups, self.eps)
        known = error[~error.isnan()]
        return float(known.max()) if len(known) else None

    def _groups(self) -> Moments:
        """Return the groups of all processes, few enough of each to be sent."""
        ranks = self.ranks
        most = max(2, GROUPS // ranks.size)
        groups = self.pool.groups(most)
        if ranks.size == 1:
            return groups
        packed = torch.zeros(3, most, groups.mean.shape[1], dtype=torch.float64)
        packed[:, : len(groups.mean)] = torch.stack(list(groups))  # type: ignore[arg-type]
        return Moments(*torch.cat(ranks.gather(packed), dim=1))

    def _result(self, reached: bool | None) -> PassResult:
        total = self.ranks.merge(self.pool.total())
        tallies = self.ranks.exchange(self.tally)
        where = next((tally.where for tally in tallies if tally.where is not None), None)
        batches, samples, rejected = (
            sum(getattr(tally, name) for tally in tallies)
            for name in ("batches", "samples", "rejected")
        )
        tally = Tally(batches, samples, rejected, where)
        return PassResult(self._split(total, self._groups()), tally, reached)

    def _split(self, total: Moments, groups: Moments) -> dict[str, Measured]:
        """Cut the row of all channels into layers."""
        cut = self.pool.split
        of_all, of_groups = ([cut(part) for part in row] for row in (total, groups))  # type: ignore[arg-type]
        found = {}
        for name in self.pool.channels:
            count, mean, m2 = (part[name] for part in of_all)
            if count.numel() and count[0] > 0:
                counts, means, m2s = (part[name] for part in of_groups)
                used = counts[:, 0] > 0
                found[name] = Measured(
                    Moments(float(count[0]), mean.clone(), m2.clone()),
                    Moments(counts[used, :1], means[used], m2s[used]),
                )
        return found
