"""The options of ``bn.convert``: their checks, and the attributes that they set on a layer."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.estimators.bank import Bank, EstimatorLike, named
from batchnorm.nn.base import BATCH, MOMENTUM, estimation
from batchnorm.ops.activations import IDENTITY
from batchnorm.sources.base import Frozen, Source
from batchnorm.sources.grouped import Grouped
from batchnorm.sources.synced import Synced
from batchnorm.surgery import rules

Filter = Callable[[str, nn.Module], bool]

SCRIPTED = """\
bn.convert expected a model in Python, got a {kind}, whose code torch.jit has already compiled. \
Convert the original model; torch.jit.trace supports the converted model in eval mode."""

SOURCE = """\
expected a source such as statistics=bn.Batch(), bn.Frozen() or bn.Synced(), got {got!r}"""

FILTER = "expected filter=function of (name, module), true for layers to convert, got {got!r}"

REFUSED = "bn.convert did not apply %s= to %d of the layers: %s"

GROUPED = """\
bn.convert cannot set statistics={source} for {name!r}, which has no buffers for these groups; \
nothing was changed. Construct the layer with bn.{kind}(..., statistics={source}) and load the \
state dict; filter= leaves layers out"""

UNGROUPED = """\
bn.convert cannot set statistics={source} for {name!r}, which stores statistics for each group of \
samples (statistics={old}): evaluation would no longer use them; nothing was changed. \
filter= leaves layers out, and bn.freeze(model) freezes them without a change of statistics="""

FROZEN = "its class normalizes by stored statistics alone"
NO_STATISTICS = "it keeps no statistics"

# Maximum number of layer names in a warning; bn.edits has all of them.
_MOST = 8


class Options(NamedTuple):
    """The options of ``bn.convert``; None for options that were not passed."""

    statistics: Source | None
    estimator: EstimatorLike | None

    def check(self, model: nn.Module, wanted: Filter | None) -> None:
        """Check the model, and that the options are a source, an estimator and a filter.

        Raises:
            SurgeryError: If the model is scripted or traced.
            OptionError: If an option is invalid.
        """
        if isinstance(model, torch.jit.ScriptModule):
            raise SurgeryError(SCRIPTED.format(kind=type(model).__name__))
        source = self.statistics
        is_source = callable(getattr(source, "share", None)) and not isinstance(source, type)
        if source is not None and not is_source:
            raise OptionError(SOURCE.format(got=source))
        if wanted is not None and not callable(wanted):
            raise OptionError(FILTER.format(got=wanted))
        if self.estimator is not None:
            named(self.estimator)

    def expect_tensors(self, name: str, layer: nn.Module, verdict: Any) -> None:
        """Check that ``statistics=`` does not need or remove a layer's buffers per group.

        Raises:
            OptionError: If it does.
        """
        new, old = self.statistics, getattr(layer, "statistics", None)
        if isinstance(verdict, rules.Left) or verdict.frozen or new in (None, old):
            return
        kind = verdict.cls.__name__ if isinstance(verdict, rules.Becomes) else type(layer).__name__
        if isinstance(new, Grouped):
            raise OptionError(GROUPED.format(source=new, name=name, kind=kind))
        if isinstance(old, Grouped):
            raise OptionError(UNGROUPED.format(source=new, name=name, old=old))

    def refused(self, layer: Any, verdict: Any) -> dict[str, str]:
        """Return the options that a layer does not support: option -> reason."""
        asked = [name for name in ("statistics", "estimator") if getattr(self, name) is not None]
        if isinstance(verdict, rules.Left):
            return dict.fromkeys(asked, verdict.reason)
        stored = self.statistics is not None and self.statistics.plan == "stored"
        found = {}
        for name in asked:
            if verdict.frozen and not (stored and name == "statistics"):
                found[name] = FROZEN
            elif layer.running_mean is None and (stored or name == "estimator"):
                found[name] = NO_STATISTICS
        return found

    def attributes(
        self, layer: Any, verdict: rules.Becomes | rules.AlreadyOurs, refused: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the attributes to set on a layer; empty if they already have these values."""
        new: dict[str, Any] = {}
        if isinstance(verdict, rules.Becomes):
            new = {"activation": IDENTITY, "statistics": BATCH, "bank": None}
            if verdict.synced:
                new["statistics"] = Synced(layer.process_group)
            if verdict.frozen:
                channels = layer.running_mean.numel()
                new |= {"statistics": Frozen(), "num_features": channels, "momentum": 0.0}
                new |= {"affine": True, "track_running_stats": False}
        has = {**layer.__dict__, **new}
        if self.statistics not in (None, has["statistics"]) and "statistics" not in refused:
            new |= {"statistics": self.statistics, "memory": None}
        if self.estimator is not None and "estimator" not in refused:
            momentum, bank = estimation(MOMENTUM, self.estimator, track_running_stats=True)
            if momentum != has["momentum"] or not _are_alike(bank, has["bank"]):
                new |= {"momentum": momentum, "bank": bank}
        return new


def warn(refused: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Log a warning with the layers that do not support an option."""
    layers: dict[str, list[str]] = {}
    for name, options in refused:
        for option, reason in options.items():
            layers.setdefault(option, []).append(f"{name or '(the model)'} ({reason})")
    for option, told in layers.items():
        more = ["..."] if told[_MOST:] else []
        text = ", ".join(told[:_MOST] + more)
        logging.getLogger("batchnorm").warning(REFUSED, option, len(told), text)


def _are_alike(new: Bank | None, old: Bank | None) -> bool:
    if new is None or old is None:
        return new is old
    return [*new.estimators.items()] == [*old.estimators.items()]
