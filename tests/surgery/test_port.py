"""bn.port: states as Keras and Flax name them, written by hand, against numpy with channels last."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support import oracle
from support.twins import assert_close, refused

X = np.random.default_rng(3).normal(size=(4, 6, 5, 3))


class Net(nn.Module):
    """Convolution, depthwise convolution, a flattened image, each with a normalization."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, (3, 2), bias=False), nn.BatchNorm2d(4)
        self.deep, self.other = nn.Conv2d(4, 8, 2, groups=4), bn.BatchNorm2d(8)
        self.head, self.last = nn.Linear(8 * 3 * 3, 5), nn.BatchNorm1d(5)
        self.double()

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.other(self.deep(x)))
        return self.last(self.head(x.flatten(1)))


def arrays(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def normalization(channels, keras):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    values = (arrays(channels), arrays(channels, 1)[:, 0], arrays(1, channels)[0], arrays(channels) ** 2 + 0.5)  # fmt: skip
    return dict(zip(names if keras else ("scale", "bias", "mean", "var"), values, strict=True))


def layers(keras):
    return [
        {"kernel": arrays(3, 2, 3, 4)}, normalization(4, keras),
        {"kernel": arrays(2, 2, 4, 2), "bias": arrays(8)}, normalization(8, keras),
        {"kernel": arrays(72, 5), "bias": arrays(5)}, normalization(5, keras),
    ]  # fmt: skip


KERAS = ("conv2d", "batch_normalization", "depthwise_conv2d", "batch_normalization_1", "dense", "batch_normalization_2")  # fmt: skip
LINEN = ("Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0", "BatchNorm_2")
EQUAL = ("conv", "norm", "deep", "other", "head", "last")


def keras():
    named = zip(KERAS, layers(keras=True), strict=True)
    found = {f"sequential/{n}/{key}": a for n, layer in named for key, a in layer.items()}
    return found | {"seed_generator/seed_generator_state": np.zeros(2, np.uint32)}


def flax(names=LINEN):
    """Sorted by name, as JAX leaves it; statistics in a collection of their own."""
    state = {"batch_stats": {}, "params": {}}
    for name, layer in sorted(zip(names, layers(keras=False), strict=True), key=lambda one: one[0]):
        for key, array in layer.items():
            room = state["batch_stats" if key in ("mean", "var") else "params"]
            room.setdefault(name, {})[key] = array
    return state


def nnx():
    layer = {name: array for name, array in zip(EQUAL, layers(keras=False), strict=True)}  # noqa: C416
    return {**dict(sorted(layer.items())), "drop": {"rngs": {"key": object()}}}


def convolved(x, kernel, depthwise=False):
    h, w = kernel.shape[:2]
    total = 0
    for i in range(h):
        for j in range(w):
            part = x[:, i : x.shape[1] - h + i + 1, j : x.shape[2] - w + j + 1]
            if depthwise:  # channel by channel
                total = total + (part[..., None] * kernel[i, j]).reshape(*part.shape[:3], -1)
            else:
                total = total + part @ kernel[i, j]
    return total


def evaluated(x, eps):
    """The network in numpy, and the input of its last normalization."""
    conv, norm, deep, other, head, last = layers(keras=False)

    def normal(x, p):
        return (x - p["mean"]) / np.sqrt(p["var"] + eps) * p["scale"] + p["bias"]

    x = np.maximum(normal(convolved(x, conv["kernel"]), norm), 0)
    x = np.maximum(normal(convolved(x, deep["kernel"], depthwise=True) + deep["bias"], other), 0)
    return normal(x.reshape(len(x), -1) @ head["kernel"] + head["bias"], last)


@pytest.mark.parametrize(("state", "source", "head", "eps"), [
    (keras, "keras", "dense", 1e-3), (flax, "flax", "Dense_0", 1e-5), (nnx, "flax", "head", 1e-5),
])  # fmt: skip
def test_outputs_and_the_biased_average_are_those_of_the_other_library(state, source, head, eps):
    net, x = Net(), torch.from_numpy(X).permute(0, 3, 1, 2)
    assert bn.port(net, state(), source=source, flatten={head: (3, 3)}) is net
    assert_close(net.eval()(x), torch.from_numpy(evaluated(X, eps)), dtype=torch.float32, size=16)
    net.train()(x)
    for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_averaged(one.norm, 0.99)
    assert [type(layer) for layer in (net.norm, net.other)] == [bn.BatchNorm2d] * 2


def assert_averaged(norm, kept):
    """Compare with the biased average of the ported statistics and those of one batch."""
    seen, before = convolved(X, layers(keras=False)[0]["kernel"]), layers(keras=False)[1]
    for got, old, new in (
        (norm.running_mean, before["mean"], seen.mean((0, 1, 2))),
        (norm.running_var, before["var"], seen.var((0, 1, 2))),
    ):
        oracle.assert_close(got.numpy(), kept * old + (1 - kept) * new, oracle.tolerance("float32"))


def test_a_second_port_starts_from_its_own_values_and_undo_restores_the_classes():
    net = Net()
    before = [str(layer) for layer in net.modules()]
    for momentum in (0.5, {"batch_normalization": 0.75, "batch_normalization_2": 0}):
        bn.port(net, keras(), source="keras", momentum=momentum, eps=0.5, flatten={"dense": None})
        net.train()(torch.from_numpy(X).permute(0, 3, 1, 2))
    assert [m.momentum for m in (net.norm, net.other, net.last)] == [0.25, 0.01, 1.0]
    assert_averaged(net.norm, 0.75)
    assert [str(layer) for layer in bn.undo(net, "port").modules()] == before


def test_layers_without_an_order_need_names():
    def two():
        return nn.ModuleDict({"query": nn.Linear(2, 2), "key_": nn.Linear(2, 2)})

    state = {name: {"kernel": arrays(2, i), "bias": arrays(2)} for i, name in ((2, "k"), (2, "q"))}
    with refused(SurgeryError, "'k'.*'q'.*'query'.*'key_'.*names=", model := two()):
        bn.port(model, state, source="flax")
    bn.port(model, state, source="flax", names={"q": "query"})
    rounded = torch.from_numpy(state["q"]["kernel"].T).float()
    assert_close(model["query"].weight, rounded, exact=True)


def without(*ends):
    return {name: array for name, array in keras().items() if not name.endswith(ends)}


FLAT = {"flatten": {"dense": (3, 3)}}
BIASED, SHAPE = Net(), {**keras(), "sequential/dense/kernel": arrays(70, 5)}
BIASED.conv.bias = nn.Parameter(torch.ones(4).double())
TIED = Net()
TIED.last.weight = TIED.last.bias


@pytest.mark.parametrize(("state", "options", "error", "says", "model"), [
    (keras(), {}, SurgeryError, "72 inputs of 'head'.*'dense': \\(height, width", None),
    (keras(), {"flatten": {"dense": (5, 7)}}, SurgeryError, "72 inputs", None),
    (keras(), {"flatten": {"dens": (3, 3)}}, OptionError, "'dens'.*expected: dense", None),
    (keras(), FLAT | {"momentum": 1.5}, OptionError, "momentum= to be a number from 0 to 1", None),
    (keras(), FLAT | {"eps": {"dense": 1e-3}}, OptionError, "'dense'.*batch_normalization", None),
    (keras(), FLAT | {"names": {"dense": "heads"}}, SurgeryError, "'heads'.*conv, norm", None),
    (keras(), FLAT | {"names": {"dense": "conv"}}, SurgeryError, "'dense'.*'conv'", None),
    (keras(), FLAT | {"source": "jax"}, OptionError, "'keras' or 'flax'", None),
    (without("_2/gamma", "_2/beta"), FLAT, SurgeryError, "'batch_normalization_2'.*trains a weight.*requires_grad_", None),
    (without("conv2d/kernel"), FLAT, SurgeryError, "'sequential/conv2d'|'depthwise_conv2d'.*bias", None),
    (without("dense/kernel", "dense/bias"), FLAT | {"flatten": None}, SurgeryError, "'head'.*Linear", None),
    (without("moving_mean"), FLAT, SurgeryError, "'batch_normalization'.*v.path", None),
    (SHAPE, FLAT, SurgeryError, "'dense'.*70.*'head'.*72", None),
    ({**keras(), "a/vars/0": arrays(3)}, FLAT, SurgeryError, "'a/vars/0'.*gamma", None),
    ({**keras(), "dense/kernel": "x"}, FLAT, SurgeryError, "'dense/kernel'.*'x'", None),
    ([1], FLAT, SurgeryError, "got list", None),
    (keras(), FLAT, SurgeryError, "'conv2d'.*'conv'.*trains a bias", BIASED),
    (keras(), FLAT, SurgeryError, "share", TIED),
    (keras(), FLAT, SurgeryError, "PReLU", nn.Sequential(Net(), nn.PReLU())),
    (keras(), FLAT, SurgeryError, "meta", Net().to("meta")),
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_with_the_names_of_both_layers(
    state, options, error, says, model
):
    with refused(error, f"(?s){says}", model := model or Net()):
        bn.port(model, state, **({"source": "keras"} | options))


def test_a_bias_that_the_other_library_does_not_have_is_zero_if_it_is_not_trained():
    model = Net()
    model.conv.bias = nn.Parameter(torch.ones(4).double(), requires_grad=False)
    expected = bn.port(Net(), keras(), source="keras", **FLAT).state_dict()
    expected["conv.bias"] = torch.zeros(4).double()
    states = bn.port(model, keras(), source="keras", **FLAT).state_dict()
    assert_close(states, {name: expected[name] for name in states}, exact=True)
