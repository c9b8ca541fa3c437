"""Statistics of the whole training set: every kind of layer, model and batch; what stays unchanged."""

import collections
import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.errors import CalibrationError
from support.calibrated import UNEQUAL, assert_exact, images, statistics
from support.third_party import timm
from support.twins import (
    Calls,
    assert_close,
    assert_unchanged,
    randomize,
    refused,
    snapshot,
    unchanged,
)

LAYERS = {
    "ours": lambda: bn.BatchNorm2d(3, activation="relu"),
    "ours, several estimates": lambda: bn.BatchNorm2d(
        3, estimator=[bn.LastBatches(2), bn.Running(0.1)]
    ),
    "ours, any rank": lambda: bn.BatchNorm(3),
    "torch": lambda: nn.BatchNorm2d(3),
    "torch, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "torch, synchronized": lambda: nn.SyncBatchNorm(3),
    "timm": lambda: timm().layers.BatchNormAct2d(3),
    "timm, synchronized": lambda: timm().layers.convert_sync_batchnorm(
        timm().layers.BatchNormAct2d(3)
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_are_exact_and_nothing_else_changes_for_every_kind_of_layer(kind, training):
    layer = LAYERS[kind]()
    randomize(layer)
    model = nn.Sequential(layer, nn.Dropout(0.5)).train(training)
    model[1].train(not training)
    layer.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    found = bn.calibrate(model, images())
    assert_exact(layer, images())
    assert found.counts == {"0": sum(UNEQUAL) * 64}
    assert int(layer.num_batches_tracked) == len(UNEQUAL)
    moved = ("running_mean", "running_var", "num_batches_tracked")
    before |= {name: value for name, value in snapshot(model).items() if name.endswith(moved)}
    assert_unchanged(before, model)
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image, repeats=1):
        return self.norm(image)


class Sample(NamedTuple):
    image: torch.Tensor
    label: int


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    repeats: int = 1


WRAPPINGS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1),
    "list": lambda x: [x, "label"],
    "list of one": lambda x: [x],
    "dict": lambda x: {"image": x},
    "mapping": lambda x: collections.OrderedDict(image=x),
    "named tuple": lambda x: Sample(x, 1),
    "dataclass": Record,
    "parameter": nn.Parameter,
    "with a gradient": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_batches_of_several_kinds_are_passed_and_an_unused_layer_is_skipped(kind):
    model = Named()
    model.unused.running_mean.fill_(5)
    found = bn.calibrate(model, map(WRAPPINGS[kind], images()))
    assert_exact(model.norm, images())
    assert found.skipped == {"unused": "not called"}
    assert model.unused.running_mean.tolist() == [5] * 3


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, first, second, scale=1):
        return self.norm(first + second) * scale


@pytest.mark.parametrize("kind", [lambda x: (x, 2 * x, 7), lambda x: {"second": 2 * x, "first": x}])
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_a_batch_gives_as_many_arguments_as_forward_requires(kind, upstream):
    model = TwoInputs()
    bn.calibrate(model, [kind(x) for x in images()], upstream=upstream)
    assert_exact(model.norm, [3 * x for x in images()])


ROWS = [torch.randn(n, 4, 3, generator=torch.Generator().manual_seed(n)) for n in UNEQUAL]
# What is called -> the layer, its call for a batch, the batches, and what enters the layer.
CALLS = {
    "an empty batch": (bn.BatchNorm2d(3), lambda m, x: m["first"](x), [torch.randn(0, 3, 8, 8), *images()], images()),
    "two calls of a shared layer": (
        bn.BatchNorm2d(3), lambda m, x: m["second"](m["first"](x) * 0 + x + 1), images(), [*images(), *(x + 1 for x in images())],
    ),
    "a batch that forward= takes apart": (
        nn.BatchNorm2d(3), lambda m, batch: m["first"](batch["pixels"]), [{"pixels": x} for x in images()], images(),
    ),
    "a mask": (
        bn.BatchNorm(4), lambda m, x: m["first"](x, mask=x[:, 0] > -1), ROWS, [x.movedim(1, 2)[x[:, 0] > -1] for x in ROWS],
    ),
    "channels on the last axis": (bn.BatchNorm(3, axis=-1), lambda m, x: m["first"](x), ROWS, [x.movedim(-1, 1) for x in ROWS]),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_statistics_are_those_of_exactly_what_enters_the_layer(what):
    layer, call, data, entering = CALLS[what]
    model = nn.ModuleDict({"first": layer, "second": layer})
    found = bn.calibrate(model, data, forward=call)
    assert_exact(layer, entering)
    assert found.counts == {"first": sum(x.numel() for x in entering) // layer.num_features}


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_layers_of_other_dtypes_and_large_means_lose_no_digits(dtype, mean):
    layer = bn.BatchNorm2d(3).to(dtype)
    data = [(x + mean).to(dtype) for x in images()]
    bn.calibrate(layer, data)
    assert_exact(layer, data)


def test_frozen_layers_are_not_calibrated():
    model = nn.Sequential(
        bn.BatchNorm2d(3),
        nn.BatchNorm2d(3),
        bn.BatchNorm2d(3, statistics=bn.Frozen()),
        nn.BatchNorm2d(3, track_running_stats=False),
        bn.freeze(nn.BatchNorm2d(3)),
    )
    model[1].eval()
    with unchanged(*model[1:]):
        found = bn.calibrate(model, images())
    assert set(found.moments) == {"0"} and set(found.skipped) == {"1", "2", "3", "4"}
    assert "frozen" in found.skipped["1"] and "bn.unfreeze" in found.skipped["4"]


def wrapper(model, **parts):
    """A module without parameters around another, as AveragedModel is."""
    return Calls(lambda m, x: m.backbone(x), backbone=model, **parts)


@pytest.mark.parametrize("wrap", [AveragedModel, wrapper, nn.Sequential])
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_a_model_in_eval_inside_of_a_wrapper_is_calibrated_and_stays_in_eval(wrap, upstream):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    wrapped = wrap(network)
    modes = [module.training for module in wrapped.modules()]
    assert modes[0] and not any(modes[1:])
    found = bn.calibrate(wrapped, images(), upstream=upstream)
    assert len(found.layers) == 1 and not found.skipped
    assert [module.training for module in wrapped.modules()] == modes
    (layer,) = (m for m in wrapped.modules() if isinstance(m, nn.BatchNorm2d))
    assert_exact(layer, [network[0](x).detach() for x in images()])


def test_a_layer_in_eval_beside_modules_that_train_is_refused_unless_layers_names_it():
    frozen = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    # A parameter of its own beside a normalization: the mode of such a module is a choice.
    mixed = wrapper(nn.BatchNorm2d(3), scale=nn.Parameter(torch.ones(())))
    for model, name in ((frozen, "1"), (mixed, "backbone")):
        model.get_submodule(name).eval()
        with refused(CalibrationError, r"in eval while the model trains.*layers=", model):
            bn.calibrate(model, images())
        assert list(bn.calibrate(model, images(), layers=name).layers) == [name]


def test_a_compiled_and_a_wrapped_model_are_calibrated_inside():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        wrapped(images()[0])
        assert set(bn.calibrate(wrapped, images()).layers) == {"0"}
        assert_exact(model[0], images())


CACHED = {"upstream": "population", "cache_bytes": 1 << 24}
BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
PARTS = {
    "a scripted part": lambda m: m.set_submodule("0", torch.jit.script(m[0])),
    "a compiled part": lambda m: m.set_submodule("0", torch.compile(m[0], backend="eager")),
    "a traced part": lambda m: m.set_submodule("0", torch.fx.symbolic_trace(m[0])),
    "a spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m[0]),
    "a synchronized layer": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a hook": lambda m: m[3].register_forward_hook(lambda module, args, output: output * 2),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))  # fmt: skip


@pytest.mark.parametrize("change", PARTS)
def test_models_with_parts_of_many_kinds_are_calibrated_alike_with_a_cache(change):
    model = net()
    PARTS[change](model)
    other = copy.deepcopy(model) if change != "a scripted part" else model
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    bn.calibrate(model, BATCHES, upstream="population")
    found = copy.deepcopy(statistics(model))
    bn.calibrate(other, BATCHES, **CACHED)
    assert_close(statistics(other), found, exact=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items() if "num" not in k)


def test_a_calibration_may_run_in_inference_mode_and_in_a_thread():
    model, other = net(), net()
    bn.calibrate(other, BATCHES, **CACHED)
    model(BATCHES[0]).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with torch.inference_mode():
        bn.calibrate(model, [batch.clone() for batch in BATCHES], **CACHED)
    assert_close(statistics(model), statistics(other), exact=True)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))
    model.train()(BATCHES[0]).square().sum().backward()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bn.calibrate, other, BATCHES).result().samples == 48


@pytest.mark.parametrize("options", [{}, {"upstream": "population"}, CACHED])
def test_a_layer_that_is_called_past_its_hooks_is_measured_all_the_same(options):
    by_forward, by_call = (
        Calls(call, one=nn.BatchNorm1d(6), two=nn.BatchNorm1d(6))
        for call in (lambda m, x: m.two(m.one.forward(x)), lambda m, x: m.two(m.one(x)))
    )
    found = bn.calibrate(by_forward, BATCHES, **options)
    bn.calibrate(by_call, BATCHES, **options)
    assert found.counts == {"one": 48, "two": 48}
    assert_close(statistics(by_forward), statistics(by_call), exact=True)
