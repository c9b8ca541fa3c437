r"""``bn.calibrate``: running statistics from a whole data set, at fixed weights.

The Moments of each layer's inputs are merged over all batches and processes, in float64. For
batches of :math:`m_i` values per channel:

.. math:: \hat\mu = \tfrac1n \sum_i m_i \mu_i, \qquad
    \hat\sigma^2 = \tfrac{1}{n-1} \sum_i m_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big)

A layer's input depends on the statistics by which the layers before it normalize. With
``upstream="batch"`` these are the batch's, as in training: one pass. With ``"population"`` they are
the calibrated statistics of these layers, as in evaluation; see ``population``.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from batchnorm.calibration.batches import Batches, Forward, Options, device_of, feed, usable_device
from batchnorm.calibration.layers import LayersLike, choose
from batchnorm.calibration.measure import measured
from batchnorm.calibration.passes import Passes
from batchnorm.calibration.population import Population
from batchnorm.calibration.result import Calibration, LayerStatistics, store
from batchnorm.calibration.stored import Place, Statistics, places, read
from batchnorm.collective import Group, Ranks
from batchnorm.errors import CalibrationError
from batchnorm.models.preserve import preserved
from batchnorm.models.walk import unwrapped
from batchnorm.progress import meter
from batchnorm.report.said import say

FAILED = """\
the input of layer {layer!r} has NaN or infinite values in {which}, so its statistics would be NaN \
or infinite; the model is unchanged. allow_nan=True includes them"""

NO_IDS = """\
layer {layer!r} stores statistics for each group of samples (statistics={source}), and was called \
without groups=; the model is unchanged. Expected a forward= that passes the group ids, such as \
forward=lambda model, batch: model(batch[0], groups=batch[1]), or a function that calls the model \
in a block of bn.groups(model, ids)."""


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    upstream: str = "batch",
    max_batches: int | None = None,
    max_samples: int | None = None,
    target_error: float | None = None,
    layers: LayersLike = None,
    passes: int | None = None,
    cache_bytes: int = 0,
    allow_nan: bool = False,
    device: torch.device | str | int | None = None,
    group: Group = None,
    progress: bool = True,
) -> Calibration:
    """Set ``running_mean`` and ``running_var`` to the mean and variance of each layer's inputs.

    Exact in float64, however the data are divided into batches and over processes. Layers with
    ``bn.Grouped`` also get statistics per group; groups without samples keep their statistics.

    Args:
        model: Changed in place, at the end; on any exception it is unchanged.
        data: Batches of any sizes, a separate share per process. The model is called with a tensor,
            with as many items of a tuple or list as its ``forward`` requires, or with a mapping or
            dataclass as keywords.
        forward: ``forward(model, batch)``, for batches of any other type.
        upstream: Statistics by which earlier layers normalize: ``"batch"`` or ``"population"``.
        max_batches: Maximum number of batches per process and pass.
        max_samples: Maximum number of samples per pass, over all processes; the last batch is cut.
        target_error: Stop when ``Calibration.error`` is this small, after at least 8 batches,
            and each layer and group of samples with values has them in two batches or more.
        layers: Names, patterns, modules or ``layers(name, module)``; default: all but frozen.
        passes: With ``"population"``, this many full passes with all layers in eval mode.
        cache_bytes: With ``"population"``, memory for results that the next pass can reuse.
        allow_nan: Whether batches with NaN or infinities count; else they are left out and
            reported.
        device: Device of the batches; by default the model's device, if it has only one.
        group: A process group; default: all processes; False: this process alone.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        CalibrationError: If there is nothing to calibrate, or no usable data.
        LayoutError: If a batch has one value per channel, with ``"batch"``.
        CollectiveError: If processes differ, have failed or are gone.
        OptionError: If an option is outside its range.
    """
    options = Options(upstream, max_batches, max_samples, target_error, passes, cache_bytes, allow_nan)  # fmt: skip  # noqa: E501
    options.check()
    ranks = Ranks(group)
    with ranks.together():
        return _calibrate(unwrapped(model), data, forward or feed, layers, device, ranks, options, progress)  # fmt: skip  # noqa: E501


def _calibrate(
    model: nn.Module,
    data: Iterable[Any],
    forward: Forward,
    layers: LayersLike,
    device: torch.device | str | int | None,
    ranks: Ranks,
    options: Options,
    progress: bool,
) -> Calibration:
    chosen, skipped = choose(model, layers)
    where = places({one.name: one.layer for one in chosen})
    ranks.agree("layers to calibrate", [(n, one.layer.num_features) for n, one in where.items()])
    ranks.agree("options", options)
    place = device_of(model) if device is None else usable_device(device)
    batches = Batches(data, options, ranks, place)
    before = {name: read(one) for name, one in where.items()}
    with (
        preserved(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        meter(batches.number, progress) as tell,
        measured(model, chosen) as measuring,
    ):
        run = functools.partial(forward, model)
        passes = Passes(measuring, batches, run, ranks, options, tell)
        if options.upstream == "batch":
            passes.once()
        elif options.passes is None:
            Population(model, passes).settle()
        else:
            passes.repeat(options.passes)
    result = _result(passes, before, skipped, options)
    store(result.layers, where)
    return result


def _result(
    passes: Passes,
    before: Mapping[str, Statistics],
    skipped: Mapping[str, str],
    options: Options,
) -> Calibration:
    _check(passes, options.allow_nan)
    where = passes.layers.places
    layers = {
        name: LayerStatistics(
            *passes.found[name], before[name], place.layer.eps, passes.remaining.get(name, 0.0)
        )
        for name, place in where.items()
        if name in passes.found
    }
    seen = passes.seen
    unused = {
        name: _why_unused(place, name in seen)
        for name, place in where.items()
        if name not in layers and (place.group is None or place.name in layers)
    }
    tallies = [result.tally for result in passes.results]
    rejected = max(tally.rejected for tally in tallies)
    if rejected:
        logging.getLogger("batchnorm").warning(
            "bn.calibrate left out %d of %d batches: the input of layer %r had NaN or infinities",
            rejected,
            max(tally.batches for tally in tallies),
            next(tally.where for tally in tallies if tally.where is not None),
        )
    return Calibration(
        layers,
        {**skipped, **unused},
        max(tally.batches for tally in tallies),
        max(tally.samples for tally in tallies),
        rejected,
        options.upstream,
        len(tallies),
        None if options.target_error is None else all(one.reached for one in passes.results),
    )


def _why_unused(place: Place, seen: bool) -> str:
    if place.group is None:
        return say("not called")
    return say("a single value of this group" if seen else "no samples of this group")


def _check(passes: Passes, allow_nan: bool) -> None:
    tallies = [result.tally for result in passes.results]
    if not any(tally.batches for tally in tallies):
        raise CalibrationError("expected at least one batch of data, got none")
    for tally in tallies:
        if tally.rejected and tally.rejected == tally.batches:
            which = "each batch" if tally.batches > 1 else "the data"
            raise CalibrationError(FAILED.format(layer=tally.where, which=which))
    if not passes.found:
        raise CalibrationError(
            "no layer to calibrate was called: the model's forward does not use these layers, or "
            "all batches were empty; the model is unchanged"
        )
    seen = passes.seen
    for name, layer in passes.layers.by_name.items():
        _, *groups = passes.layers.keys([name])
        if groups and name in passes.found and seen.isdisjoint(groups):
            raise CalibrationError(NO_IDS.format(layer=name, source=layer.statistics))
    for name, one in passes.found.items():
        if float(one.moments.count) < 2 and not allow_nan:
            raise CalibrationError(
                f"layer {name!r} got {float(one.moments.count):g} values per channel; a variance "
                "needs at least 2; the model is unchanged"
            )
