"""``bn.same`` says "same" of twenty kinds of pairs that compute the same, on several architectures."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import optimization

import batchnorm as bn
from support import networks
from support.combinations import each
from support.compared import Net, settled
from support.lanes import lanes
from support.oracle import POOLED, STORED
from support.twins import Calls


def call_attention(m, ids):
    x = m.table(ids)
    x = x + F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1))
    x = m.norm1(x.transpose(1, 2)).transpose(1, 2)
    x = x + m.drop(m.down(F.gelu(m.up(x))))
    return {"hidden": x, "pooled": m.norm2(x.mean(1))}


def attention():
    """A transformer-like block with batch norms, which returns a dictionary."""
    layers = {"qkv": nn.Linear(16, 48), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}
    norms = {"norm1": nn.BatchNorm1d(16), "norm2": nn.BatchNorm1d(16)}
    return Calls(
        call_attention, table=nn.Embedding(20, 16), drop=nn.Dropout(0.2), **layers, **norms
    )


def sound():
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def volume():
    return nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        nn.Conv3d(6, 4, 2), nn.BatchNorm3d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3),
    )  # fmt: skip


SMALL = {
    "images": (Net, (4, 3, 12, 12)),
    "sound": (sound, (4, 3, 16)),
    "volume": (volume, (4, 2, 6, 6, 6)),
    "tokens": (attention, (6, 5)),
}


def built(name):
    build, shape = SMALL[name]
    torch.manual_seed(3)
    model = build()
    if name == "tokens":
        return model.eval(), torch.randint(0, 20, shape)
    return settled(model, 8, *shape[1:]), torch.randn(shape) * 2 + 1


def changed(change):
    return lambda model, data: change(copy.deepcopy(model))


def by_state_dict(model):
    state = copy.deepcopy(model.state_dict())
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(1)
    model.load_state_dict(state)
    return model


def parametrized(model):
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        nn.utils.parametrizations.weight_norm(module)
    return model


def partly_compiled(model):
    norms = (n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    name = next(norms)
    model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


# Pairs for eval and training: (model, data) -> the other one.
BOTH = {
    "itself": lambda model, data: model,
    "deepcopy": lambda model, data: copy.deepcopy(model),
    "pickle": lambda model, data: pickle.loads(pickle.dumps(model)),
    "state dict": changed(by_state_dict),
    "converted": changed(bn.convert),
    "undone": changed(lambda model: bn.undo(bn.convert(model))),
    "save_memory": changed(bn.save_memory),
    "wrapped": changed(nn.DataParallel),
    "frozen parameters": changed(lambda model: model.requires_grad_(False)),
    "parametrized": changed(parametrized),
    "parts compiled": changed(partly_compiled),
}

# Pairs for eval alone.
IN_USE = {
    "in training mode": changed(nn.Module.train),
    "another momentum": changed(lambda m: [setattr(x, "momentum", 0.5) for x in m.modules()] and m),
    "folded": lambda model, data: bn.fold(copy.deepcopy(model), data).model,
    "unfolded": lambda model, data: bn.undo(bn.fold(copy.deepcopy(model), data).model),
    "fused by torch.fx": lambda model, data: optimization.fuse(copy.deepcopy(model)),
    "compiled": changed(lambda model: torch.compile(model, backend="eager")),
    "compiled in place": changed(compiled_in_place),
    "traced": lambda model, data: torch.jit.trace(model, data, check_trace=False, strict=False),
    "batchnorm backend": changed(lambda model: torch.compile(model, backend="batchnorm")),
    "exported": lambda model, data: torch.export.export(model, (data,)),
}


@each(pair=itertools.product(("eval", "train"), BOTH), name=SMALL)
def test_models_in_another_form_are_the_same_in_evaluation_and_training(pair, name):
    (mode, how), (model, data) = pair, built(name)
    gradients = how != "frozen parameters"
    found = bn.same(model, BOTH[how](model, data), data, mode=mode, gradients=gradients)
    assert found, str(found)
    # Weight norm rounds its parts.
    assert found.layers and found.error < (STORED.rtol * 2 if how == "parametrized" else POOLED)


# Most that can be folded, compiled or exported is in the network of images.
@each(fast=8, how=IN_USE, name=["tokens", "sound", "images", "volume", "images"])
def test_models_in_another_form_are_the_same_in_evaluation(how, name):
    model, data = built(name)
    found = bn.same(model, IN_USE[how](model, data), data)
    assert found, str(found)
    # Rounding of parameters takes a small part of what is allowed.
    assert all(row.error <= 0.2 * row.allowed for row in found.layers)


@pytest.mark.parametrize(
    ("name", "layout"), [("images", torch.channels_last), ("volume", torch.channels_last_3d)]
)
def test_channels_last_is_the_same(name, layout):
    model, data = built(name)
    other = copy.deepcopy(model).to(memory_format=layout)
    assert bn.same(model, other, data, mode="train", gradients=True)
    assert bn.same(model, other, data.to(memory_format=layout))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "sound", "volume"])
def test_an_onnx_file_is_the_same_and_another_is_not(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, data = built(name)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings(action="ignore"):  # of the exporter, about itself
        torch.onnx.export(model, (data,), path, dynamo=True, verbose=False)
    assert bn.same(model, path, data)
    changed_layer = {"images": "one.conv1", "sound": "3", "volume": "4"}[name]
    with torch.no_grad():
        model.get_submodule(changed_layer).weight.view(-1)[0] *= 1.01
    assert not bn.same(model, str(path), data)


def test_a_compiled_model_that_differs_is_found():
    model, data = built("images")
    other = copy.deepcopy(model)
    other.one.bn1.eps = 2e-4
    found = bn.same(model, torch.compile(other, backend="eager"), data)
    assert not found and "where" in found.first.message and "is allowed" in found.first.message


def test_a_model_in_a_distributed_wrapper_is_the_same():
    model, data = built("images")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # fmt: skip
    try:
        other = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert bn.same(model, other, data, mode="train")
    finally:
        torch.distributed.destroy_process_group()


SLOW = "torchvision resnet18"
FORMS = [
    SLOW,
    "torchvision mobilenet_v3",
    "torchvision densenet",
    "timm regnety",
    "timm efficientnet_b0",
]


@pytest.mark.parametrize("name", lanes(FORMS, slow=[SLOW]))
def test_networks_of_others_are_the_same_in_every_form(name):
    torch.manual_seed(4)
    model = settled(networks.NETWORKS[name][0](), 8, 3, 64, 64, steps=3)
    data = torch.randn(2, 3, 64, 64) * 2 + 1
    pairs = {
        "converted": bn.convert(copy.deepcopy(model)),
        "folded": bn.fold(copy.deepcopy(model), data).model,
        "backend": torch.compile(copy.deepcopy(model), backend="batchnorm"),
        "exported": torch.export.export(model, (data,)),
    }
    for how, other in pairs.items():
        found = bn.same(model, other, data)
        assert found, f"{how}: {found}"
        assert all(row.error <= 0.2 * row.allowed for row in found.layers)
    assert bn.same(model, pairs["converted"], data, mode="train", gradients=True)
    *_, conv = (m for m in pairs["folded"].modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        conv.weight[0] *= 1.01
    found = bn.same(model, pairs["folded"], data)
    assert not found and pairs["folded"].get_submodule(found.first.layer) is conv, str(found)
