"""Three small networks trained on handwritten digits, and the faults that tests plant in them."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from support import trained
from support.twins import Calls


def dense():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip


def residual():
    model = trained.Residual()
    model.head = nn.Linear(12, 10)
    return model


BUILDERS = {"dense": dense, "convolutional": convolutional, "residual": residual}


@functools.cache
def digits():
    """Return images (1797, 3, 8, 8) with mean 0 and deviation 1, and labels, in random order."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(1))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None].expand(-1, 3, -1, -1)
    return (images - images.mean()) / images.std(), torch.tensor(found.target)[order]


@dataclass
class Case:
    """Arguments of ``bn.diagnose``, and the expected subject of its finding."""

    model: Any
    data: Any
    optimizer: Any = None
    # Names of the batch norms; faults are planted in the first by default.
    layers: list = field(default_factory=list)
    # Subject of the expected finding; None: the first layer.
    subject: str | None = None
    # Further options of bn.diagnose.
    options: dict = field(default_factory=dict)

    @property
    def first(self):
        return self.model.get_submodule(self.layers[0])

    def expected(self):
        return self.layers[0] if self.subject is None else self.subject

    def found(self, **options):
        options = {"optimizer": self.optimizer, **self.options, **options}
        diagnosis = bn.diagnose(self.model, self.data, **options)
        return diagnosis, {(one.rule, one.subject) for one in diagnosis.findings}


def batches(size=32, number=12, change=lambda images: images):
    return [change(part) for part in digits()[0].split(size)[:number]]


def fit(model, steps=60, rate=0.02):
    """Return the model after some steps on digits."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    model.train()
    for step in range(steps):
        at = slice(step % 50 * 32, step % 50 * 32 + 32)
        loss = nn.functional.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def case(name, before=lambda model: model):
    """Return a healthy case; ``before`` changes the model before it is trained."""
    torch.manual_seed(0)
    model = fit(before(BUILDERS[name]()))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return Case(model, batches(), optimizer, layers)


# --- faults in a trained model: each changes a healthy case


def _off(layer, share=1.0):
    """Shift and scale the running statistics at random, in proportion to ``share``."""
    torch.manual_seed(5)
    sigma = layer.running_var.sqrt()
    layer.running_mean += share * 2 * sigma * torch.randn_like(sigma)
    layer.running_var *= torch.exp(share * torch.randn_like(sigma))


def _lost(one):
    _off(one.first)


def _few_steps(one):
    """Scale the first layer's inputs by 6; set the statistics as two training steps would."""
    before = next(m for m in one.model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    before.weight *= 6
    one.first.running_mean.mul_(6 * (1 - 0.9**2))
    one.first.running_var.mul_(36).lerp_(torch.ones_like(one.first.running_var), 0.9**2)
    for name in one.layers:
        one.model.get_submodule(name).num_batches_tracked.fill_(2)


def _slow(one):
    _off(one.first)
    one.first.momentum = 0.001
    one.first.num_batches_tracked.fill_(20_000)


def _keras(one):
    one.first.momentum = 0.99


def _small(one):
    """Use batches of three images of constant brightness: all positions have the same value."""
    one.data = batches(3, 40, lambda x: x.mean((2, 3), keepdim=True).expand_as(x))


def _other_input(one):
    one.data = batches(change=lambda images: images * 3 + 2)


def _sorted(one):
    images, labels = digits()
    one.data = list(images[labels.argsort()].split(64))


def _swapped(one):
    layers = [one.model.get_submodule(name) for name in one.layers]
    a = layers[0]
    b = next(m for m in layers[1:] if m.num_features == a.num_features)
    for name in ("running_mean", "running_var"):
        mine, other = a.get_buffer(name), b.get_buffer(name)
        mine[:], other[:] = other.clone(), mine.clone()


def _plain(one):
    one.first.track_running_stats = False
    one.first.running_mean = one.first.running_var = one.first.num_batches_tracked = None


def _other_class(one):
    old = one.first
    kind = bn.BatchNorm1d if isinstance(old, nn.BatchNorm1d) else bn.BatchNorm2d
    new = kind(old.num_features, eps=1e-3)
    new.load_state_dict(old.state_dict())
    one.model.set_submodule(one.layers[0], new)
    one.optimizer = torch.optim.SGD(one.model.parameters(), 0.1)


def _requires_grad_off(one):
    one.first.requires_grad_(False)


def _asleep(one):
    one.model.train()
    one.first.eval()


def _awake(one):
    one.first.train = lambda mode=True: one.first


def _still(one):
    one.first.momentum = 0.0


def _forgotten(one):
    own = {id(p) for p in one.first.parameters()}
    one.optimizer = torch.optim.SGD([p for p in one.model.parameters() if id(p) not in own], 0.1)


def _decayed(one):
    one.optimizer = torch.optim.SGD(one.model.parameters(), 0.1, weight_decay=0.01)
    one.subject = ""


def _one_left(one):
    images, labels = digits()
    one.data = DataLoader(TensorDataset(images[:353], labels[:353]), 32)
    one.subject = ""


def _without_activation(one):
    names = [name for name, module in one.model.named_modules() if isinstance(module, nn.ReLU)]
    one.model.set_submodule(names[0], nn.Identity())


# --- faults that only training steps show


def loss(output, batch):
    return nn.functional.cross_entropy(output, torch.arange(len(output)) % 10)


STEPS = {"loss": loss, "steps": 8}


def _diverging(one):
    one.optimizer.param_groups[0]["lr"] = 1e30


def _switched_on(one):
    _asleep(one)

    def switch(model, args, name=one.layers[0]):
        if torch.is_grad_enabled():
            model.get_submodule(name).train()

    one.model.register_forward_pre_hook(switch)


def _inside(kind, one):
    """Wrap the model in another module."""
    one.model, one.layers = kind(one.model), [f"body.{name}" for name in one.layers]


def _elsewhere(body):
    """Return a model that uses copies of its buffers in training steps."""

    def call(m, x):
        state = {name: buffer.clone() for name, buffer in m.body.named_buffers()}
        trains = torch.is_grad_enabled()
        return torch.func.functional_call(m.body, state, (x,)) if trains else m.body(x)

    return Calls(call, body=body)


def _checkpointed(body):
    def call(m, x):
        trains = torch.is_grad_enabled()
        return checkpoint(m.body, x, use_reentrant=False) if trains else m.body(x)

    return Calls(call, body=body)


def _skipping(body):
    """Return a model with a layer that training steps do not call."""

    def call(m, x):
        y = m.body(x)
        if not torch.is_grad_enabled():
            m.spare(y)
        return y

    return Calls(call, body=body, spare=nn.BatchNorm1d(10))


def _skipped(one):
    _inside(_skipping, one)
    one.subject = "spare"
    bn.calibrate(one.model, one.data, layers=["spare"])
    one.optimizer = torch.optim.SGD(one.model.parameters(), 0.1)


def _detached(one):
    one.first.register_forward_hook(lambda layer, args, out: out.detach())


def _lagging(one):
    one.first.momentum = 0.01
    one.optimizer.param_groups[0]["lr"] = 2.0


STEPPED = {
    "BN901": _diverging,
    "BN902": _switched_on,
    "BN903": functools.partial(_inside, _elsewhere),
    "BN904": _detached,
    "BN905": _skipped,
    "BN906": _lagging,
    "BN907": functools.partial(_inside, _checkpointed),
}
AFTER = {
    "BN501": _lost,
    "BN502": _few_steps,
    "BN503": _slow,
    "BN504": _keras,
    "BN505": _small,
    "BN506": _other_input,
    "BN507": _sorted,
    "BN508": _swapped,
    "BN606": _plain,
    "BN607": _other_class,
    "BN608": _without_activation,
    "BN701": _requires_grad_off,
    "BN702": _asleep,
    "BN703": _awake,
    "BN704": _still,
    "BN705": _forgotten,
    "BN706": _decayed,
    "BN707": _one_left,
}


# --- faults in the model's structure, before it is trained


def _with(model):
    """Return a network with a batch norm that is not called."""
    return Calls(lambda m, x: m.body(x), body=model, spare=nn.BatchNorm1d(4))


def _names(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _shared(model):
    """Replace a later layer of the same size by the first layer, called on scaled inputs."""
    names = _names(model)
    first = model.get_submodule(names[0])
    later = [n for n in names[1:] if model.get_submodule(n).num_features == first.num_features][-1]
    model.set_submodule(later, nn.Sequential(Calls(lambda _, x: x * 6 + 2), first))
    return model


def _biased(model):
    *parent, number = _names(model)[0].split(".")
    before = model.get_submodule(".".join([*parent, str(int(number) - 1)]))
    before.bias = nn.Parameter(torch.ones(before.weight.shape[0]))
    return model


def _dropped(model):
    name = _names(model)[-1]
    layer = model.get_submodule(name)
    model.set_submodule(name, nn.Sequential(nn.Dropout(0.4), layer))
    return model


def _around(act, model):
    """Return a network that applies ``act`` to its output in eval mode only."""
    call = lambda m, x: m.body(x) if m.training else m.act(m.body(x))
    return Calls(call, body=model, act=act)


def _in_graphs(is_one, y):
    return y + 1 if is_one() else y


ACTS = {
    "BN801": lambda y: nn.functional.dropout(y, 0.1),
    "BN802": lambda y: y - y.mean(0),
    "BN803": lambda y: y * torch.arange(1, len(y) + 1)[:, None],
    "BN804": lambda y: y * len(y),
    "BN806": functools.partial(_in_graphs, torch.compiler.is_dynamo_compiling),
    "BN807": functools.partial(_in_graphs, torch.compiler.is_exporting),
}
# Rules that need graphs=True.
GRAPHS = {"BN806", "BN807"}
BEFORE = {"BN601": _shared, "BN602": _with, "BN603": _biased, "BN604": _dropped}
BEFORE |= {rule: functools.partial(_around, act) for rule, act in ACTS.items()}
RULES = (*AFTER, *BEFORE, *STEPPED)
SUBJECTS = {"BN602": lambda names: "spare", "BN604": lambda names: names[-1]}
SUBJECTS |= {rule: lambda names: "" for rule in ACTS}
# Rule -> other rules that also find its fault.
_BESIDE = {"BN802", "BN803", "BN804"}
CONSEQUENCES = {
    "BN105": {"BN401"}, "BN207": {"BN206"}, "BN208": {"BN206"}, "BN201": {"BN206"},
    "BN202": {"BN206"}, "BN205": {"BN206"}, "BN503": {"BN206"}, "BN505": {"BN501", "BN506"}, "BN601": {"BN206", "BN501"},
    "BN602": {"BN202"}, "BN608": {"BN501"}, "BN606": {"BN802", "BN804"}, "BN703": {"BN802", "BN804"},
    "BN902": {"BN702"}, "BN905": {"BN206"},
    "BN801": _BESIDE, "BN802": _BESIDE, "BN803": _BESIDE, "BN804": _BESIDE,
}  # fmt: skip


def planted(rule, name):
    """Return a case with the fault that a rule should find."""
    one = case(name, BEFORE.get(rule, lambda model: model))
    if rule in SUBJECTS:
        one.subject = SUBJECTS[rule](one.layers)
    if rule in STEPPED:
        STEPPED[rule](one)
        one.options = STEPS
    elif rule in AFTER:
        with torch.no_grad():
            AFTER[rule](one)
    return one
