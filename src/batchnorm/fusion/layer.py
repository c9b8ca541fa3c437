"""What a converted layer knows about its place in the model."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import BatchNormError
from batchnorm.fusion import session, watchers
from batchnorm.fusion.pending import pend
from batchnorm.fusion.plan import Plan
from batchnorm.fusion.prepared import prepare
from batchnorm.fusion.state import State, current_modes
from batchnorm.fusion.traces import Normally
from batchnorm.ops.backend import is_torchs
from batchnorm.ops.onlookers import is_recomputing

# (adds, training) -> the number of elements below which the detour costs more than it saves:
# 30 to 270 microseconds of Python against passes over memory (docs/decisions/0008-pending.md).
SMALLEST = {
    (False, True): 1 << 18,
    (False, False): 1 << 19,
    (True, True): 1 << 20,
    (True, False): 1 << 20,
}


class Fusion:
    """The plans of one layer, by training or not: a Plan, or why there is none.

    Copies and pickles start without plans and learn them anew.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.plans: dict[bool, Plan | str] = {}

    def __reduce__(self) -> Any:
        return Fusion, (self.name,)

    def forward(self, layer: Any, x: Tensor, residual: Any, mask: Any) -> Tensor:
        """Compute the layer; the result may be pending where the model will absorb it."""
        running = session.current()
        if running is None or residual is not None or mask is not None:
            return layer._forward(x, residual, mask)  # type: ignore[no-any-return]
        key = layer.training
        if running.watch is not None:
            y: Tensor = layer._forward(x, None, None)
            running.watch.follow(layer, key, y)
            return y
        plan = self.plans.get(key)
        if plan is None:
            running.look_again()
        elif type(x) is Tensor and x.numel() >= _least(plan, key):
            running.is_needed = True
            if type(plan) is Plan:
                pending = self._pending(layer, x, key, plan, running.alive)
                if pending is not None:
                    return pending
            if not key:
                with Normally():  # others may add it, and must see whether it changes
                    return layer._forward(x, None, None)  # type: ignore[no-any-return]
        return layer._forward(x, None, None)  # type: ignore[no-any-return]

    def missed(self, key: bool, reason: str) -> None:
        """Give up a plan that did not come true."""
        self.plans[key] = f"expected {self.plans[key]}, then came {reason}"

    def _pending(
        self, layer: Any, x: Tensor, key: bool, plan: Plan, alive: list[list[Any]]
    ) -> Tensor | None:
        # Nothing is gained where a normalization and what follows it are several kernels anyway.
        if is_torchs(x) or _leaves_no_trace(layer, x):
            return None
        if watchers.count_what_is_saved() or _seen_by_others(layer, plan):
            return None
        try:
            with Normally():
                made = prepare(layer, x, plan.act, whole=not plan.adds)
        except BatchNormError:
            return None  # the layer raises it again, with its name
        if made is None:
            return None
        prepared, ahead = made
        state = State(
            self.name,
            prepared,
            plan,
            None,
            current_modes(),
            (),
            lambda reason: self.missed(key, reason),
            alive,
        )
        return pend(state, None if plan.adds else ahead)

    def __str__(self) -> str:
        lines = [
            f"in {'training' if training else 'evaluation'} "
            + (f"fused with {plan}" if isinstance(plan, Plan) else f"not fused: {plan}")
            for training, plan in self.plans.items()
        ]
        return "; ".join(lines) or "nothing fused yet: it has not run"


def _least(plan: Plan | str, training: bool) -> int:
    """Return from how many elements on a layer with this plan has anything to do with fusing."""
    return SMALLEST[plan.adds if type(plan) is Plan else True, training]


def _leaves_no_trace(layer: Any, x: Tensor) -> bool:
    """Whether a change in place of what a result is made from could not be seen."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return True
    parts = (*layer._parameters.values(), *layer._buffers.values())
    return any(part is not None and part.is_inference() for part in parts)


def _seen_by_others(layer: Any, plan: Plan) -> bool:
    """Whether a hook would get hold of the output, or backward is running."""
    if watchers.are_everywhere() or any(map(watchers.are_at, plan.crossed)):
        return True
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return True
    # The second forward of activation checkpointing runs within backward.
    return is_recomputing()
