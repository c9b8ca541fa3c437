"""bn.insert: what it puts where, with which numbers, and how it is taken back."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import SurgeryError
from support import third_party
from support.combinations import each, pairs
from support.twins import (
    Calls,
    assert_close,
    assert_optimizes,
    in_float64,
    optimized,
    refused,
    unchanged,
)


class Functional(nn.Module):
    """An MLP with a functional sigmoid."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.sigmoid(self.two(torch.sigmoid(self.one(x)))))


def convolutions():
    """Convolutions of three kinds in front of activations; one has no bias."""

    def call(m, x):
        x = F.relu(m.deep(F.relu(m.conv(x))), inplace=True)
        return F.gelu(m.up(x)).mean((2, 3))

    return Calls(
        call,
        conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        deep=nn.Conv2d(4, 6, 3, groups=2, bias=False),
        up=nn.ConvTranspose2d(6, 4, 2, stride=2),
    )


def block():
    """The MLP of a transformer block: tokens (N, T, C), with a residual."""
    parts = {"norm": nn.LayerNorm(5), "wide": nn.Linear(5, 9), "narrow": nn.Linear(9, 5)}
    return Calls(lambda m, x: x + m.narrow(m.act(m.wide(m.norm(x)))), act=nn.GELU(), **parts)


NETWORKS = {
    "mlp": (Functional, (32, 6), ["one", "two"]),
    "convolutions": (convolutions, (4, 3, 6, 6), ["conv", "deep", "up"]),
    "block": (block, (4, 7, 5), ["wide"]),
    "sequence": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.SELU(), nn.Dropout(0.5), nn.Conv1d(4, 2, 1)),
        (6, 2, 9),
        ["0"],
    ),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def built(name, dtype=torch.float32):
    build, shape, names = NETWORKS[name]
    return build().to(dtype), 2 * torch.randn(shape).to(dtype) + 1, names


def inserted(model):
    return [edit.names[0] for edit in bn.edits(model).changed if edit.verb == "insert"]


def outputs_of(model, names, x):
    """What layers return, in float64, with dropout off."""
    model = copy.deepcopy(model).double().eval()
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _m, _x, y, name=name: found.update({name: y.clone()}))
    with torch.no_grad():
        y = model(x.double())
    return y, found


def variance(y, norm):
    return y.movedim(norm.axis, -1).flatten(0, -2).var(0)


@pairs(name=NETWORKS, dtype=DTYPES, training=[False, True])
def test_init_preserve_keeps_the_outputs_of_evaluation(name, dtype, training):
    model, x, names = built(name, dtype)
    model.train(training)
    expected, outputs = outputs_of(model, names, x)
    bn.insert(model, x)
    assert inserted(model) == names
    assert all(m.training is training for m in model.modules())
    got, _ = outputs_of(model, [], x)
    # Parameters are rounded to dtype, the arithmetic of bfloat16 is float32's.
    wide = torch.promote_types(dtype, torch.float32)
    coarse = 16 * torch.finfo(dtype).eps / torch.finfo(wide).eps
    assert_close(got, expected, dtype=dtype, size=coarse * float(expected.abs().max()))
    for one in names:
        layer, norm = model.get_submodule(one)
        assert getattr(layer, "bias", None) is None
        assert norm.running_mean.dtype == wide
        var = variance(outputs[one], norm)
        assert_close(norm.running_var.double(), var, dtype=wide, size=4 * coarse * float(var.max()))
        gamma = (norm.running_var.double() + norm.eps).sqrt()
        assert_close(norm.weight.double(), gamma, dtype=dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_normalize_gives_every_activation_inputs_of_mean_0_and_variance_1(name):
    model, x, names = built(name)
    bn.insert(model, [x, x[1:] + 0.5], init="normalize")
    _, outputs = outputs_of(model, names, torch.cat([x, x[1:] + 0.5]))
    for one in names:
        layer, norm = model.get_submodule(one)
        rounded = {"dtype": torch.float32, "size": 16}
        mean = outputs[one].movedim(norm.axis, -1).flatten(0, -2).mean(0)
        assert_close(mean, torch.zeros_like(mean), **rounded)
        shrunk = norm.running_var.double() / (norm.running_var.double() + norm.eps)
        assert_close(variance(outputs[one], norm), shrunk, **rounded)
        assert bool((norm.weight == 1).all() and (norm.bias == 0).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_undo_returns_the_model_from_before_the_insertion(name):
    model, x, names = built(name)
    with unchanged(model):
        bn.insert(model, x)
        assert isinstance(model.get_submodule(names[0]), nn.Sequential)
        bn.undo(model, "insert")


def test_undo_of_a_trained_insertion_needs_force():
    model, x, _ = built("mlp")
    weight, bias = model.one.weight, model.one.bias
    bn.insert(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(SurgeryError, match="would lose"):
        bn.undo(model, "insert")
    bn.undo(model, "insert", force=True)
    assert model.one.weight is weight and model.one.bias is bias


def test_an_optimizer_has_the_parameters_of_the_inserted_layers_in_place_of_biases():
    model, x, _ = built("convolutions")
    weights = [model.conv.weight, model.deep.weight]
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.01)
    bn.insert(model, x, optimizer=optimizer)
    assert model.conv[0].weight is weights[0] and model.deep[0].weight is weights[1]
    assert_optimizes(optimizer, model)
    assert optimized(optimizer)[0] == [*map(id, [weights[0], *model.conv[1].parameters()])]
    model(x).square().mean().backward()
    before = model.conv[1].weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.conv[1].weight)


@each(name=NETWORKS, init=["preserve", "normalize"])
def test_state_dicts_from_before_and_after_the_insertion_load(name, init):
    model, x, names = built(name)
    old = NETWORKS[name][0]()
    bn.insert(model, x, init=init)
    wrapped = nn.Sequential(model)
    wrapped.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()})
    assert_close(model.eval()(x), old.eval()(x), size=16)
    assert bn.edits(model).changed[0].keys["weight"] == "0.weight"
    other = bn.insert(NETWORKS[name][0](), x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("made", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_compute_the_same_and_load_old_state_dicts(made):
    model, x, _ = built("mlp")
    state = copy.deepcopy(model.state_dict())
    other = made(bn.insert(model, x)).eval()
    expected = model.eval()(x)
    assert torch.equal(other(x), expected)
    other.load_state_dict(state)
    assert_close(other(x), expected, size=16)


def test_a_layer_of_two_names_stays_one_layer():
    first, x = nn.Linear(4, 4), torch.randn(8, 4)
    model = Calls(lambda m, x: m.second[0](x).relu(), first=first, second=nn.ModuleList([first]))
    expected = in_float64(model, x)
    bn.insert(model, x)
    assert model.first is model.second[0]
    assert isinstance(model.first, nn.Sequential)
    assert_close(model.eval()(x), expected, size=16)


def test_forward_hooks_of_a_layer_still_receive_its_own_output():
    model, x, _ = built("mlp")
    seen, looks = [], []
    model.one.register_forward_hook(lambda _m, _x, y: seen.append(y) if looks else None)
    bn.insert(model, x)
    looks.append(True)
    model.eval()(x)
    assert_close(seen[0], x @ model.one[0].weight.T, size=16)


@pytest.mark.slow
def test_vgg_11_computes_the_same_after_insertion_and_after_removal():
    model = third_party.torchvision().models.vgg11(init_weights=False)
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))
    x = torch.randn(4, 3, 32, 32)
    original = copy.deepcopy(model)
    bn.insert(model, x)
    assert len(inserted(model)) == 8 + 1
    assert bn.same(original, model, x)
    model.train()(x)
    expected = model.eval()(x)
    bn.remove(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert_close(model(x), expected, size=64 * expected.abs().max().item())


@pytest.mark.parametrize("init", ["preserve", "normalize"])
def test_a_linear_layer_with_a_normalization_takes_inputs_of_any_rank(init):
    x = torch.randn(8, 4)
    model = bn.insert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x, init=init)
    for mode in (False, True):
        model.train(mode)
        assert_close(model(x.view(2, 4, 4)), model(x).view(2, 4, 4), size=16)


def test_lbfgs_trains_the_parameters_of_the_inserted_layers():
    model, x, _ = built("mlp")
    optimizer = torch.optim.LBFGS(model.parameters())
    bn.insert(model, x, optimizer=optimizer)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def loss():
        optimizer.zero_grad()
        value = (model(x) - 1).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def made_of_functional(**options):
    model = Functional()
    model.one.bias.requires_grad_(options.get("bias", True))
    model.one.weight.requires_grad_(options.get("weight", True))
    return bn.insert(model, torch.randn(32, 6))


@pytest.mark.parametrize("name", ["weight", "bias", "in_features"])
def test_attributes_of_the_layer_inside_cannot_be_set_on_the_sequential(name):
    model = made_of_functional()
    with refused(AttributeError, f"{name}.*\\[0\\] is the layer", model):
        setattr(model.one, name, nn.Parameter(torch.ones(8)))


@pairs(weight=[True, False], bias=[True, False])
def test_gamma_is_trained_where_the_weight_was_and_beta_where_the_bias_was(weight, bias):
    norm = made_of_functional(weight=weight, bias=bias).one[1]
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (weight, bias)


@pytest.mark.parametrize("gone", ["one.bias", "one.weight"])
def test_a_key_that_a_state_dict_from_before_lacks_is_reported_missing(gone):
    state = Functional().state_dict()
    del state[gone]
    now = {"one.bias": "one.bias", "one.weight": "one.0.weight"}[gone]
    assert made_of_functional().load_state_dict(state, strict=False).missing_keys == [now]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{now}"'):
        made_of_functional().load_state_dict(state)


def test_statistics_on_the_meta_device_are_missing_in_a_state_dict_from_before():
    model = made_of_functional().to("meta")
    found = model.load_state_dict(Functional().state_dict(), strict=False, assign=True)
    assert {"one.1.running_mean", "one.1.weight"} <= set(found.missing_keys)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_whose_weight_is_computed_before_each_call_is_copied_for_the_proof():
    x = torch.randn(16, 3, 6, 6)
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    expected = model(x)
    assert_close(bn.insert(model, x).eval()(x), expected, size=32)
    assert_close(bn.remove(model)(x), expected, size=32)


# Layers that are left, and insertions that fail.

X = torch.randn(8, 4)


def model_of(run, a=None):
    """A layer "a", one "b", and what the case makes of them."""
    return Calls(run, a=a or nn.Linear(4, 4), b=nn.Linear(4, 4))


def both(m, x):
    return F.relu(m.a(x)) + F.relu(m.b(x))


class Own(nn.Linear):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x) + self.bias


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), layer)
    return layer


LEFT = {
    "an attribute is read": (
        lambda: model_of(lambda m, x: both(m, x).to(m.a.weight.dtype)),
        "reads .weight",
    ),
    "an attribute is asked for": (
        lambda: model_of(lambda m, x: both(m, x) * hasattr(m.a, "in_features")),
        "reads .in_features",
    ),
    "read elsewhere": (
        lambda: model_of(lambda m, x: F.relu(z := m.a(x)) + z.abs() + F.relu(m.b(x))),
        "also read by",
    ),
    "returned": (
        lambda: model_of(lambda m, x: (F.relu(m.b(x)), z := m.a(x), F.relu(z))),
        "is returned",
    ),
    "parametrized": (
        lambda: model_of(both, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        "computed by modules",
    ),
    "own class": (lambda: model_of(both, Own(4, 4)), "overrides forward"),
    "own forward": (lambda: model_of(both, replaced()), "overrides forward"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_layer_is_skipped_with_a_reason_and_the_others_are_not(case):
    build, reason = LEFT[case]
    model = build()
    expected = in_float64(model, X)
    bn.insert(model, X)
    (left,), (changed,) = bn.edits(model).skipped, bn.edits(model).changed
    assert (left.names, changed.names) == (("a",), ("b",))
    assert reason in left.reason
    assert_close(model.eval()(X), expected, size=16)


def test_a_filter_leaves_out_a_layer_that_is_called_twice():
    model = model_of(lambda m, x: F.relu(m.b(F.relu(m.a(F.relu(m.a(x)))))))
    bn.insert(model, X, filter=lambda name, _: name != "a")
    assert [edit.names for edit in bn.edits(model).changed] == [("b",)]


def fails_with_a_sequential(m, x):
    if isinstance(m.a, nn.Sequential):
        raise TypeError("no Sequential, please")
    return both(m, x)


def test_a_model_and_an_optimizer_are_unchanged_if_the_model_fails_after_the_insertion():
    model = model_of(fails_with_a_sequential)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = optimized(optimizer)
    with refused(TypeError, "no Sequential", model):
        bn.insert(model, X, optimizer=optimizer)
    assert optimized(optimizer) == before


def test_an_insertion_that_bn_same_does_not_prove_is_undone():
    model = model_of(lambda m, x: both(m, x) * (1 + isinstance(m.a, nn.Sequential)))
    with refused(SurgeryError, "would change the model.s results in evaluation", model):
        bn.insert(model, X)
    assert isinstance(bn.insert(model, X, init="normalize").a, nn.Sequential)
