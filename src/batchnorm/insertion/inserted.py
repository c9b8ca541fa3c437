"""What a linear layer becomes: itself and a normalization, one after the other.

The module stays the same object, so every reference to it stays valid; the layer that it was goes
on as its child "0", with the same parameters.
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
    """A linear layer ``[0]`` without bias, and the batch normalization ``[1]`` behind it.

    State dicts of the layer alone can be loaded. The weight goes to ``[0]``, and the normalization
    gets γ = sqrt(running_var + ε) and β = running_mean + bias, by which evaluation computes what
    the layer alone computed.
    """

    def __getattr__(self, name: str) -> Any:
        """Raise for an attribute of the layer inside, and note that it was asked for."""
        modules: Mapping[str, Any] = vars(self).get("_modules", {})
        if name not in modules and hasattr(modules.get("0"), name):
            vars(self).get("asked", set()).add(name)
            raise AttributeError(GONE.format(name=name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise for an attribute of the layer inside, which would not change here."""
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
            # What has no values, on the meta device, is missing; torch says so.
            known = {f"{prefix}1.{key}": value for key, value in had.items() if not value.is_meta}
            shift = state.get(f"{prefix}bias")
            if shift is None and self._had_bias():
                missing.append(f"{prefix}bias")
            fits = shift is None or shift.shape == norm.running_mean.shape
            # A bias of another size is loaded as it is, for torch's error about sizes.
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
    """Return γ and β by which a normalization in evaluation adds ``shift``, and nothing else.

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
    """A layer as it was before ``bn.insert``."""

    def undo(self, owner: Any) -> None:
        """Let the module be the layer again, with its present weight and its bias of before."""
        now = {name: one for name, one in tables(owner[0])[0].items() if one is not None}
        super().undo(owner)
        tables(owner)[0].update(now)
        bias = tables(owner)[0].get("bias")
        if bias is not None:
            with torch.no_grad():
                bias.data = bias.data.to(owner.weight.device, owner.weight.dtype)


@dataclass(frozen=True)
class Removal(Unfold):
    """A layer with its normalization as it was before ``bn.remove``."""

    def undo(self, owner: Any) -> None:
        """Put the normalization back, in the mode that the layer was switched to since."""
        super().undo(owner)
        if owner.training != self.modules[""].attributes["training"]:
            owner.train(owner.training)

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the normalization, whose own record is part of the model's."""
        whole = self.modules.get("")
        return {} if whole is None else {"1": whole.attributes["_modules"]["1"]}


def wrap(layer: nn.Module, norm: Layer) -> Insertion:
    """Put a normalization behind a layer, in place, and drop the layer's bias."""
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
    """Note the values of γ and β, so that undo can say if training has changed them."""
    for name in ("1.weight", "1.bias"):
        change.written[name] = checksum_of(layer.get_parameter(name))


def unwrap(layer: nn.Module, bias: nn.Parameter | None = None) -> Removal:
    """Let a module be the layer inside of it again.

    Args:
        layer: An ``Inserted``.
        bias: The bias that it gets; None to leave it as it is.
    """
    change = Removal(modules={"": as_it_is(layer)})
    inner = layer.get_submodule("0")
    become(layer, inner)
    if bias is not None:
        tables(layer)[0]["bias"] = bias
        change.written["bias"] = checksum_of(bias)
        change.new.append("bias")
    return change
