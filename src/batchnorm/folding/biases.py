"""Which layers without a bias would use one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from batchnorm.compat.modules import tables
from batchnorm.folding.ledger import Leaf
from batchnorm.models.flow import Flow

# Their forward adds ``bias`` if it is there. A subclass may have another forward.
TAKES_BIAS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


def bias_takers(model: nn.Module, run: Callable[[], Flow]) -> Mapping[str, Leaf]:
    """Return the biases that layers without one would use.

    Where a class is not torch's own, its layers get a bias of zeros for one pass, which shows
    whether an operator inside of the layer reads it.

    Args:
        model: The model.
        run: Runs it on an example.
    """
    found: dict[str, Leaf] = {}
    unknown: dict[str, Leaf] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or not _lacks_bias(module):
            continue
        known = any(type(module).forward is cls.forward for cls in TAKES_BIAS)
        known = known and "forward" not in vars(module)
        (found if known else unknown)[name] = _bias_of(name, module)
    if unknown:
        with _biases_of_zeros(model, unknown):
            flow = run()
        for name, leaf in unknown.items():
            readers = flow.readers(flow.parameters[str(leaf)])
            if readers and all(flow.step(call.number).name == name for call in readers):
                found[name] = leaf
    return found


def _lacks_bias(module: nn.Module) -> bool:
    return isinstance(module, TAKES_BIAS) and tables(module)[0].get("bias", 0) is None


def _bias_of(name: str, module: nn.Module) -> Leaf:
    channels = getattr(module, "out_channels", None) or module.out_features
    return Leaf(name, "bias", (int(channels),), "new")  # type: ignore[arg-type]


@contextmanager
def _biases_of_zeros(model: nn.Module, leaves: Mapping[str, Leaf]) -> Iterator[None]:
    try:
        for name, leaf in leaves.items():
            layer = model.get_submodule(name)
            weight: nn.Parameter = layer.weight  # type: ignore[assignment]
            tables(layer)[0]["bias"] = nn.Parameter(weight.detach().new_zeros(leaf.shape))
        yield
    finally:
        for name in leaves:
            tables(model.get_submodule(name))[0]["bias"] = None
