"""The estimators of a layer with their states; evaluation uses the selected one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.base import Estimator, Statistics
from batchnorm.estimators.running import OPTIMIZER, Accumulated, Averages, Running
from batchnorm.moments import Moments

# Prefix of the states in a state dict, after the layer's prefix.
PREFIX = "estimators."

EstimatorLike = Estimator | Sequence[Estimator] | Mapping[str, Estimator]


def named(estimators: EstimatorLike) -> dict[str, Estimator]:
    """Return an estimator, or a sequence or mapping of estimators, as a dict name -> estimator.

    Raises:
        OptionError: If a value is not an estimator, the collection is empty, or two estimators have
            the same name.
    """
    if isinstance(estimators, Mapping):
        found = dict(estimators)
    else:
        several: Sequence[Any] = [estimators]
        if isinstance(estimators, Sequence) and not isinstance(estimators, str):
            several = estimators
        found = {getattr(one, "name", repr(one)): one for one in several}
        if len(found) < len(several):
            raise OptionError(
                f"expected estimators of different names, got {list(several)}; give them names: "
                "estimator={'fast': bn.Running(0.1), 'slow': bn.Running(0.01)}"
            )
    for name, one in found.items():
        if not all(callable(getattr(one, part, None)) for part in ("init", "update", "statistics")):
            raise OptionError(
                f"expected an estimator such as bn.Running(0.1) or bn.LastBatches(10), "
                f"got {one!r} for {name!r}"
            )
    if not found:
        raise OptionError("expected at least one estimator, got none")
    return found


def is_state(name: str, state_dict: Mapping[str, Any]) -> bool:
    """Return whether an entry of a state dict is a state of an estimator.

    State dicts of ``torch.nn`` layers have no such entries; a layer that loads one restarts its
    estimators.
    """
    layer, found, _ = f".{name}".rpartition(f".{PREFIX}")
    return bool(found) and f"{layer}.running_mean".removeprefix(".") in state_dict


class Bank:
    """The estimators of a layer and their states; the first is selected by default.

    Attributes:
        estimators: name -> estimator.
        states: name -> state of the estimator.
        selected: Name of the estimate that evaluation uses.
    """

    def __init__(self, estimators: dict[str, Estimator]) -> None:
        self.estimators = estimators
        self.states: dict[str, Any] = {}
        self.selected = next(iter(estimators))

    def restart(self, channels: int, device: torch.device, known: Averages | None = None) -> None:
        """Set all states to their initial values, or running averages to ``known`` if given."""
        for name, estimator in self.estimators.items():
            state = estimator.init(channels, device)
            if known is not None and isinstance(state, Averages | Accumulated):
                seen = known.batches
                if isinstance(estimator, Running) and isinstance(estimator.every, int):
                    seen = seen // estimator.every
                own = zip(state, (known.mean, known.var, seen), strict=False)
                state = type(state)(*(t.to(old, copy=True) for old, t in own), *state[3:])
            self.states[name] = state

    def updated(self, batch: Moments) -> dict[str, Any]:
        """Return the states after one more batch."""
        return {
            name: estimator.update(self.states[name], batch)
            for name, estimator in self.estimators.items()
        }

    @property
    def waits(self) -> bool:
        """Whether an estimator has ``every="optimizer"``."""
        return any(_waits(one) for one in self.estimators.values())

    def after_optimizer(self) -> dict[str, Any]:
        """Return the states after a step of the optimizer."""
        return {
            name: estimator.step(self.states[name]) if _waits(estimator) else self.states[name]
            for name, estimator in self.estimators.items()
        }

    def statistics(self, states: Mapping[str, Any]) -> Statistics:
        """Return mean and variance of the selected estimate."""
        return self.estimators[self.selected].statistics(states[self.selected])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the states by its name in a state dict.

        The name is ``estimators.{name}.{field}``, e.g. ``estimators.last_batches.means``.
        """
        return {
            f"{PREFIX}{name}.{field}": tensor
            for name, state in self.states.items()
            for field, tensor in state._asdict().items()
        }

    def load(self, found: Mapping[str, Tensor]) -> list[str]:
        """Load states from tensors of a state dict; estimators without tensors keep their state.

        Args:
            found: Tensors by name, as ``tensors`` names them.

        Returns:
            Error messages in torch's format; if there are any, nothing has been changed.
        """
        known, errors = self.tensors(), []
        for name, tensor in found.items():
            if name in known and tensor.shape != known[name].shape:
                errors.append(
                    f"size mismatch for {name}: copying a param with shape {tensor.shape} from "
                    f"checkpoint, the shape in current model is {known[name].shape}."
                )
        for name, state in self.states.items():
            names = [f"{PREFIX}{name}.{field}" for field in state._fields]
            absent = [one for one in names if one not in found]
            if absent and len(absent) < len(names):
                errors.append(f"expected all of {names}, or none; {absent} are missing.")
        if not errors:
            for name, state in self.states.items():
                values = [found.get(f"{PREFIX}{name}.{field}") for field in state._fields]
                new = [
                    value.detach().to(old, copy=True)
                    for value, old in zip(values, state, strict=True)
                    if value is not None
                ]
                if new:
                    self.states[name] = type(state)(*new)
        return errors

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the states by ``move(tensor)``."""
        for name, state in self.states.items():
            self.states[name] = type(state)(*(move(tensor) for tensor in state))


def _waits(estimator: Estimator) -> TypeGuard[Running]:
    return isinstance(estimator, Running) and estimator.every == OPTIMIZER
