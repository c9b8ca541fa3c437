"""Updates an optimizer for the parameters of a folded model."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer


def rewire(
    optimizer: Optimizer,
    gone: Sequence[nn.Parameter],
    beside: Mapping[nn.Parameter, nn.Parameter],
    changed: Sequence[nn.Parameter],
) -> Callable[[], None]:
    """Replace parameters in an optimizer by those of a folded model.

    Args:
        optimizer: The optimizer.
        gone: Parameters that the model no longer has; they are removed from their groups.
        beside: New parameter -> the parameter whose group it joins, if that has a group.
        changed: Parameters with new values, whose optimizer state is reset.

    Returns:
        A function that restores the groups and the state.
    """
    groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
    forgotten = {
        one: optimizer.state.pop(one) for one in (*gone, *changed) if one in optimizer.state
    }
    leaving = set(map(id, gone))
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        members = set(map(id, before))
        joining = [new for new, like in beside.items() if id(like) in members]
        # In place, since torch.optim.LBFGS keeps a reference to this list.
        group["params"][:] = [one for one in before if id(one) not in leaving] + joining

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=False):
            group["params"][:] = before
        for new in beside:
            optimizer.state.pop(new, None)
        for one, state in forgotten.items():
            optimizer.state[one] = state

    return restore
