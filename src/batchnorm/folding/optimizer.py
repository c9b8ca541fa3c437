"""An optimizer goes on with the parameters that a model has after a fold."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer


def rewire(
    optimizer: Optimizer,
    gone: Sequence[nn.Parameter],
    beside: Mapping[nn.Parameter, nn.Parameter],
    changed: Sequence[nn.Parameter],
) -> Callable[[], None]:
    """Let an optimizer have the parameters of a folded model.

    Args:
        optimizer: The optimizer.
        gone: Parameters that the model does not have any more; they leave their groups.
        beside: New parameter -> the one whose group it joins, if that is in one.
        changed: Parameters with new values: what the optimizer remembers of them starts anew.

    Returns:
        A function that gives it its groups and its memory back.
    """
    groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
    forgotten = {
        one: optimizer.state.pop(one) for one in (*gone, *changed) if one in optimizer.state
    }
    leaving = set(map(id, gone))
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        members = set(map(id, before))
        joining = [new for new, like in beside.items() if id(like) in members]
        # In place, since torch.optim.LBFGS goes on to use this very list.
        group["params"][:] = [one for one in before if id(one) not in leaving] + joining

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=False):
            group["params"][:] = before
        for new in beside:
            optimizer.state.pop(new, None)
        for one, state in forgotten.items():
            optimizer.state[one] = state

    return restore
