"""The class that replaces a linear layer: a ``Sequential`` of the layer and a normalization.

The module stays the same object, so every reference to it stays valid. Its child "0" is a new layer
with the same parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import tables
from batchnorm.folding.change import Unfold, as_it_is, become, checksum_of
from batchnorm.models.change import record_of
from batchnorm.nn.base import Layer
from batchnorm.nn.foreign import RECORD

GONE = """\
{name!r} is an attribute of the layer inside: since bn.insert this module is its Sequential with a \
batch normalization, and [0] is the layer"""


class Inserted(nn.Sequential):
    """A linear layer ``[0]`` without bias, and the batch normalization ``[1]`` after it.

    State dicts of the layer alone can be loaded: the weight goes to ``[0]``, and the normalization
    gets γ = sqrt(running_var + ε) and β = running_mean + bias, so that evaluation gives the same
    result as the layer alone.
    """

    def __getattr__(self, name: str) -> Any:
        """Raise for an attribute of the layer inside, and record the access."""
        modules: Mapping[str, Any] = vars(self).get("_modules", {})
        if name not in modules and hasattr(modules.get("0"), name):
            vars(self).get("asked", set()).add(name)
            raise AttributeError(GONE.format(name=name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise for an attribute of the layer inside, where the assignment would have no effect."""
        inner = vars(self).get("_modules", {}).get("0")
        own = name in vars(self) or hasattr(type(self), name)
        if inner is not None and not own and hasattr(inner, name):
            raise AttributeError(GONE.format(name=name))
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        layer, norm = self[0], self[1]
        old = [key for key in state if _is_of_layer(key[len(prefix) :])]
        if old:
            had = norm.state_dict()
            # Tensors on the meta device have no values and count as missing; torch reports that.
            known = {f"{prefix}1.{key}": value for key, value in had.items() if not value.is_meta}
            shift = state.get(f"{prefix}bias")
            if shift is None and self._had_bias():
                missing.append(f"{prefix}bias")
            fits = shift is None or shift.shape == norm.running_mean.shape
            # A bias of another size is passed on, so that torch raises its error about sizes.
            gamma, beta = preserving(norm, shift) if fits else (shift, shift)
            if not norm.running_mean.is_meta:
                known |= {f"{prefix}1.weight": gamma, f"{prefix}1.bias": beta}
            for key in old:
                value = state.pop(key)
                if key != f"{prefix}bias" or tables(layer)[0].get("bias") is not None:
                    state[f"{prefix}0.{key[len(prefix) :]}"] = value
            state.update({key: value for key, value in known.items() if key not in state})
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *rest)

    def _had_bias(self) -> bool:
        """Return whether the layer had a bias before ``bn.insert``."""
        return any("bias" in one.edit.keys for one in record_of(self) if one.edit.verb == "insert")


def _is_of_layer(key: str) -> bool:
    return key.partition(".")[0] not in ("0", "1")


def preserving(norm: Any, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return γ and β with which a normalization in evaluation only adds ``shift``.

    Args:
        norm: The normalization, with statistics.
        shift: (C,); None for zeros.
    """
    std = (norm.running_var.detach().double() + norm.eps).sqrt()
    gamma = std.to(norm.weight.dtype)
    beta = norm.running_mean.detach().double() * (gamma / std)
    if shift is not None:
        beta = beta + shift.to(beta)
    return gamma, beta.to(norm.weight.dtype)


@dataclass(frozen=True)
class Insertion(Unfold):
    """The state of a layer before ``bn.insert``."""

    def undo(self, owner: Any) -> None:
        """Restore the layer, with its current weight and its earlier bias."""
        now = {name: one for name, one in tables(owner[0])[0].items() if one is not None}
        super().undo(owner)
        tables(owner)[0].update(now)
        bias = tables(owner)[0].get("bias")
        if bias is not None:
            with torch.no_grad():
                bias.data = bias.data.to(owner.weight.device, owner.weight.dtype)


@dataclass(frozen=True)
class Removal(Unfold):
    """The state of a layer with its normalization before ``bn.remove``."""

    def undo(self, owner: Any) -> None:
        """Restore the normalization, in the layer's current mode."""
        super().undo(owner)
        if owner.training != self.modules[""].attributes["training"]:
            owner.train(owner.training)

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the normalization, whose own record is part of the model's."""
        whole = self.modules.get("")
        return {} if whole is None else {"1": whole.attributes["_modules"]["1"]}


def wrap(layer: nn.Module, norm: Layer) -> Insertion:
    """Insert a normalization after a layer, in place, and remove the layer's bias."""
    whole = as_it_is(layer)
    inner: Any = whole.cls.__new__(whole.cls)
    attributes = {key: value for key, value in whole.attributes.items() if key != RECORD}
    vars(inner).update(attributes)
    vars(inner)["_parameters"] = dict(whole.attributes["_parameters"])
    if "bias" in tables(inner)[0]:
        tables(inner)[0]["bias"] = None
    both = Inserted(inner, norm)
    both.training = layer.training
    become(layer, both)
    return Insertion(modules={"": whole})


def seal(layer: nn.Module, change: Insertion) -> None:
    """Store the values of γ and β, so that undo can detect training."""
    for name in ("1.weight", "1.bias"):
        change.written[name] = checksum_of(layer.get_parameter(name))


def unwrap(layer: nn.Module, bias: nn.Parameter | None = None) -> Removal:
    """Replace an ``Inserted`` by the layer inside of it, in place.

    Args:
        layer: An ``Inserted``.
        bias: The new bias; None to keep it unchanged.
    """
    change = Removal(modules={"": as_it_is(layer)})
    inner = layer.get_submodule("0")
    become(layer, inner)
    if bias is not None:
        tables(layer)[0]["bias"] = bias
        change.written["bias"] = checksum_of(bias)
        change.new.append("bias")
    return change
