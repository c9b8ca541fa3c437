"""``bn.no_weight_decay``: parameter groups for an optimizer."""

from typing import Any

from torch import nn

from batchnorm.models.edits import expect_model
from batchnorm.models.kinds import kind_of


def no_weight_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters of a model as two groups: all others, and those without weight decay.

    The second has weight and bias of every batch normalization, of any library, and
    ``"weight_decay": 0.0``. Decay of a layer in front of a normalization changes no output, only
    the size of its steps; decay of γ and β does change outputs.

        optimizer = torch.optim.AdamW(bn.no_weight_decay(model), lr=1e-3, weight_decay=0.05)

    Args:
        model: A model.

    Returns:
        Groups as ``torch.optim`` takes them, in the order of ``model.parameters()``. Each
        parameter is in one of them, those that require no gradient too. A group without parameters
        is left out.

    Raises:
        SurgeryError: If the model is none.
    """
    expect_model(model, "no_weight_decay")
    own = {
        parameter
        for module in model.modules()
        if kind_of(module) is not None
        for parameter in module.parameters(recurse=False)
    }
    others = [parameter for parameter in model.parameters() if parameter not in own]
    exempt = [parameter for parameter in model.parameters() if parameter in own]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
