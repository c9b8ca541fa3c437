"""Random networks with batch normalizations that by construction can or cannot be folded.

A builder draws one element after another and writes Python source for ``forward``, so that
functional calls, views, branches of Python and in-place operations are the real thing. It knows of
each batch normalization whether folding it is legal, because it decides that itself: a *legal*
element makes a tensor that nothing else reads, in a layer that nothing else uses, with operations
between that commute with a scale and a shift per channel. An *illegal* one breaks one of these
conditions, by name. Nothing here imports what it tests.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import batchnorm as bn

CHANNELS = (2, 3, 4, 6)


@dataclass
class Graph:
    """A network, its input, and which of its normalizations must be folded.

    Attributes:
        seed: Draws the same network again.
        model: The network in eval mode.
        x: Example input.
        legal: Names that must be folded.
        illegal: Name that must stay -> the condition that is broken.
        source: Source code of ``forward``.
        eps: Spacing at 1 of the narrowest dtype.
    """

    seed: int
    model: nn.Module
    x: Tensor
    legal: list[str]
    illegal: dict[str, str]
    source: str
    eps: float


@dataclass
class Builder:
    """The network drawn so far: modules, lines of ``forward``, and the tensor ``x``."""

    random: random.Random
    channels: int
    size: int
    parts: dict[str, nn.Module] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    legal: list[str] = field(default_factory=list)
    illegal: dict[str, str] = field(default_factory=dict)
    hooked: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    torch_only: bool = False

    def add(self, kind: str, part: nn.Module) -> str:
        name = f"{kind}{sum(one.startswith(kind) for one in self.parts)}"
        self.parts[name] = part
        return name

    def say(self, *lines: str) -> None:
        self.lines += lines

    def norm(self, channels: int | None = None, rank: int = 2) -> str:
        """Add a random kind of normalization with a known number of channels."""
        count = channels or self.channels
        draw = self.random.random()
        eps = self.random.choice((1e-5, 1e-3))
        affine = self.random.random() < 0.85
        if self.torch_only:
            draw = 1.0
        if draw < 0.25:
            kinds = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d}
            return self.add("norm", kinds[rank](count, eps=eps, affine=affine))
        if draw < 0.3:
            return self.add("norm", nn.SyncBatchNorm(count, eps=eps, affine=affine))
        kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
        return self.add("norm", kinds[rank](count, eps=eps, affine=affine))

    def conv(self, out: int | None = None, *, bias: bool | None = None, **options) -> str:
        """Add a random kind of convolution for the current tensor."""
        r, inputs = self.random, self.channels
        out = out or r.choice(CHANNELS)
        bias = r.random() < 0.5 if bias is None else bias
        common = [g for g in (1, 2, 3, inputs) if inputs % g == 0 and out % g == 0]
        groups = r.choice(common)
        if r.random() < 0.2 and not options:
            layer = nn.ConvTranspose2d(inputs, out, 3, padding=1, groups=groups, bias=bias)
        else:
            mode = r.choice(("zeros", "zeros", "reflect", "replicate", "circular"))
            given = {"kernel_size": 3, "padding": 1, "padding_mode": mode} | options
            if given["padding"] == 0:
                given.pop("padding_mode")
            layer = nn.Conv2d(inputs, out, groups=groups, bias=bias, **given)
        if r.random() < 0.08:
            layer = nn.utils.parametrizations.weight_norm(layer)
        self.channels = out
        return self.add("conv", layer)

    def activate(self) -> None:
        self.say(self.random.choice(("x = F.relu(x)", "x = torch.sigmoid(x)", "x = F.silu(x)")))


# Legal elements: folding must remove their normalizations.


def behind_convolution(b: Builder) -> None:
    conv, between = b.conv(), ""
    for _ in range(b.random.randrange(3)):
        between = b.random.choice(BETWEEN)
        b.say(f"y = {between.format(x=f'self.{conv}(x)' if conv else 'y')}")
        conv = ""
    if conv:
        b.say(f"y = self.{conv}(x)")
    name = b.norm()
    b.say(f"x = self.{name}(y)")
    b.legal.append(name)


BETWEEN = (
    "{x}.clone()",
    "F.dropout({x}, 0.5, self.training)",
    "{x}.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
    "{x}.transpose(2, 3)",
    "{x}.flatten(2).unflatten(2, (self.size, self.size))",
    "2 * {x} - 0.5",
    "F.avg_pool2d({x}, 3, 1, 1, count_include_pad=False)",
    "torch.cat([{x}], 1)",
    "{x}.to(memory_format=torch.channels_last)",
    "torch.neg({x})",
    "F.channel_shuffle({x}, 1)",
    "{x}.flip(3)",
)


def functional(b: Builder) -> None:
    """Calls of ``F`` with the parameters of modules, by position and by keyword."""
    conv, name = _plain_conv(b), b.norm()
    groups = b.parts[conv].groups
    weight, bias = f"self.{conv}.weight", f"self.{conv}.bias"
    form = b.random.choice(
        (
            f"y = F.conv2d(x, {weight}, bias={bias}, padding=1, groups={groups})",
            f"y = F.conv2d(x, {weight}, {bias}, 1, 1, 1, {groups})",
        )
    )
    b.say(form)
    norm = b.parts[name]
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and b.random.random() < 0.6:
        n = f"self.{name}"
        b.say(
            f"x = F.batch_norm(y, {n}.running_mean, {n}.running_var, {n}.weight, bias={n}.bias, "
            f"eps={n}.eps)"
        )
    else:
        b.say(f"x = self.{name}(y)")
    b.legal.append(name)


def _plain_conv(b: Builder, bias: bool = True, **options) -> str:
    inputs, out = b.channels, b.random.choice(CHANNELS)
    groups = b.random.choice([g for g in (1, 2) if inputs % g == 0 and out % g == 0])
    given = {"kernel_size": 3, "padding": 1} | options
    b.channels = out
    return b.add("conv", nn.Conv2d(inputs, out, groups=groups, bias=bias, **given))


def concatenated(b: Builder) -> None:
    """A norm behind ``cat``, which folding splits over the concatenated layers."""
    inputs, names, total = b.channels, [], 0
    for _ in range(b.random.choice((2, 3))):
        b.channels = inputs
        names.append(b.conv())
        total += b.channels
    b.channels = total
    name = b.norm()
    parts = ", ".join(f"self.{conv}(x)" for conv in names)
    b.say(f"x = self.{name}(torch.cat([{parts}], dim=1))")
    b.legal.append(name)
    _narrow(b)


def _narrow(b: Builder) -> None:
    """Reduce the number of channels by a pointwise convolution."""
    out = b.random.choice(CHANNELS)
    conv = b.add("conv", nn.Conv2d(b.channels, out, 1))
    b.channels = out
    b.say("x = F.relu(x)", f"x = self.{conv}(x)")


def summed(b: Builder) -> None:
    """Branches, some with a norm, and sometimes a norm behind their sum."""
    inputs, out = b.channels, b.random.choice(CHANNELS)
    terms = []
    for _ in range(b.random.choice((2, 3))):
        b.channels = inputs
        conv = b.conv(out)
        term = f"self.{conv}(x)"
        if b.random.random() < 0.5:
            name = b.norm(out)
            b.legal.append(name)
            term = f"self.{name}({term})"
        terms.append(term)
    joined = terms[0]
    for term in terms[1:]:
        joined = b.random.choice(
            (f"{joined} + {term}", f"{joined} - {term}", f"torch.add({joined}, {term}, alpha=2)")
        ) if b.random.random() < 0.9 else f"({joined}).add_({term})"  # fmt: skip
    b.channels = out
    if b.random.random() < 0.6:
        name = b.norm()
        b.legal.append(name)
        joined = f"self.{name}({joined})"
    b.say(f"x = {joined}")


def forward_fold(b: Builder) -> None:
    """A norm behind an activation, before a convolution that does not pad with zeros."""
    b.activate()
    name = b.norm()
    inputs = b.channels
    kind = b.random.choice(("pointwise", "reflect", "inner"))
    options = {
        "pointwise": {"kernel_size": 1, "padding": 0},
        "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        "inner": {"kernel_size": 3, "padding": 0},
    }[kind]
    out = b.random.choice(CHANNELS)
    groups = b.random.choice([g for g in (1, 2) if inputs % g == 0 and out % g == 0])
    bias = b.random.random() < 0.5
    conv = b.add("conv", nn.Conv2d(inputs, out, groups=groups, bias=bias, **options))
    if kind == "inner":
        b.say(f"x = self.{conv}(self.{name}(F.pad(x, (1, 1, 1, 1))))")
    else:
        between = b.random.choice(
            ("{x}", "F.dropout({x}, 0.3, False)", "{x}.clone()", "3 * {x} + 1")
        )
        inner = between.format(x=f"self.{name}(x)")
        b.say(f"x = self.{conv}({inner})")
    b.channels = out
    b.legal.append(name)


def tokens(b: Builder) -> None:
    """A linear layer on (N, T, C), with the norm on C behind a transpose or a flattening."""
    out = b.random.choice(CHANNELS)
    linear = b.add("linear", nn.Linear(b.channels, out, bias=b.random.random() < 0.6))
    b.channels = out
    name = b.norm(rank=1)
    b.say("t = x.flatten(2).transpose(1, 2)", f"t = self.{linear}(t)")
    if b.random.random() < 0.5:
        b.say(f"t = self.{name}(t.flatten(0, 1)).reshape_as(t)")
    else:
        b.say(f"t = self.{name}(t.transpose(1, 2)).transpose(1, 2)")
    b.say("x = t.transpose(1, 2).reshape(x.shape[0], -1, self.size, self.size)")
    b.legal.append(name)


def mixed(b: Builder) -> None:
    """A layer in bfloat16 and a norm in float32, with casts."""
    conv = _plain_conv(b)
    b.parts[conv].bfloat16()
    name = b.norm()
    b.say(f"x = self.{name}(self.{conv}(x.to(self.half)).to(self.whole))")
    b.legal.append(name)


def with_residual(b: Builder) -> None:
    """A layer of this library that adds a residual and has an activation."""
    conv = b.conv(b.channels)
    act = b.random.choice((None, "relu", "leaky_relu(0.1)"))
    name = b.add("norm", bn.BatchNorm2d(b.channels, activation=act))
    b.say(f"x = self.{name}(self.{conv}(x), x)")
    b.legal.append(name)


# Illegal elements: each breaks one condition.


def consumed_twice(b: Builder) -> None:
    conv = b.conv()
    name = b.norm()
    b.say(
        f"y = self.{conv}(x)",
        f"x = self.{name}(y) + {b.random.choice(('y', 'y.tanh()', 'y.mean()'))}",
    )
    b.illegal[name] = "its input is read elsewhere"


def shared_layer(b: Builder) -> None:
    conv = b.add("conv", nn.Conv2d(b.channels, b.channels, 3, padding=1))
    one, two = b.norm(), b.norm()
    if b.random.random() < 0.5:
        b.say(f"x = self.{one}(self.{conv}(x)).relu()", f"x = self.{two}(self.{conv}(x))")
        b.illegal[two] = "its layer is used twice"
    else:
        b.say(f"x = self.{one}(self.{conv}(x)).relu()", f"x = self.{conv}(x)")
        del b.parts[two]
    b.activate()
    b.illegal[one] = "its layer is used twice"


def shared_norm(b: Builder) -> None:
    one, two = (b.add("conv", nn.Conv2d(b.channels, b.channels, 3, padding=1)) for _ in "ab")
    name = b.norm()
    b.say(f"x = self.{name}(self.{one}(x)).relu()", f"x = self.{name}(self.{two}(x))")
    b.activate()
    b.illegal[name] = "it is used twice"


def behind_activation(b: Builder) -> None:
    conv = b.conv()
    name = b.norm()
    b.say(f"x = self.{name}(self.{conv}(x).{b.random.choice(('tanh()', 'relu_()', 'abs()'))})")
    # An activation: otherwise the next layer could absorb the normalization.
    b.activate()
    b.illegal[name] = "an activation is between"


def another_axis(b: Builder) -> None:
    """A linear layer on C with a norm on T, of equal size."""
    length = b.size * b.size
    linear = b.add("linear", nn.Linear(b.channels, length))
    back = b.add("linear", nn.Linear(length, b.channels))
    name = b.add("norm", nn.BatchNorm1d(length))
    b.say("t = x.flatten(2).transpose(1, 2)", f"t = self.{name}(self.{linear}(t)).relu()")
    b.say(f"t = self.{back}(t)", "x = t.transpose(1, 2).reshape(x.shape)")
    b.illegal[name] = "the channels are on another axis"


def zero_padded(b: Builder) -> None:
    """A norm before a convolution that pads with zeros, where its shift does not apply."""
    b.activate()
    name = b.norm()
    conv = _plain_conv(b)
    b.say(f"x = self.{conv}(self.{name}(x))")
    b.illegal[name] = "the shift is none where zeros are padded"


def hooks(b: Builder) -> None:
    conv = b.conv()
    name = b.norm()
    b.say(f"x = self.{name}(self.{conv}(x))", "x = F.relu(x)")
    b.hooked.append(b.random.choice((conv, name)))
    b.illegal[name] = "a hook sees a tensor between"


def returned(b: Builder) -> None:
    conv = b.conv()
    name = b.norm()
    variable = f"out{len(b.returned)}"
    b.say(f"{variable} = self.{conv}(x)", f"x = self.{name}({variable})")
    b.activate()
    b.returned.append(variable)
    b.illegal[name] = "its input is returned"


def branch(b: Builder) -> None:
    """A Python branch on a tensor's value; the example input takes the first path."""
    conv = b.conv(b.channels)
    name = b.norm()
    other = b.random.choice(
        (f"self.{conv}(x)", f"self.{name}(x)", f"x + self.{conv}.weight.sum()", "x")
    )
    b.say(f"x = self.{name}(self.{conv}(x)) if x.abs().mean() < 1e6 else {other}")
    b.illegal[name] = "Python branches in its frame"


def part_written(b: Builder) -> None:
    conv = b.conv()
    name = b.norm()
    b.say(f"y = self.{conv}(x)", "y[:, 0] = y[:, 0].tanh()", f"x = self.{name}(y)", "x = F.relu(x)")
    b.illegal[name] = "a part of its input is written to"


def trained(b: Builder) -> None:
    conv = b.conv()
    name = b.add("norm", nn.BatchNorm2d(b.channels, track_running_stats=False))
    b.say(f"x = self.{name}(self.{conv}(x))", "x = F.relu(x)")
    b.illegal[name] = "it normalizes by the batch"


def computed_weight(b: Builder) -> None:
    conv = _plain_conv(b)
    name = b.norm()
    groups = b.parts[conv].groups
    b.say(
        f"y = F.conv2d(x, self.{conv}.weight.tanh(), self.{conv}.bias, padding=1, groups={groups})"
    )
    b.say(f"x = self.{name}(y)", "x = F.relu(x)")
    b.illegal[name] = "its layer's weight is computed"


LEGAL = (behind_convolution,) * 3 + (
    functional, concatenated, summed, summed, forward_fold, tokens, with_residual, mixed,
)  # fmt: skip
ILLEGAL = (
    consumed_twice, shared_layer, shared_norm, behind_activation, another_axis, zero_padded, hooks,
    returned, part_written, trained, computed_weight,
)  # fmt: skip


class Random(nn.Module):
    """A network whose ``forward`` is compiled from source code."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.size = builder.size
        self.half, self.whole = torch.bfloat16, torch.float32
        for name, part in builder.parts.items():
            self.add_module(name, part)
        result = ", ".join(["x", *builder.returned])
        body = [*builder.lines, f"return {result}"]
        source = "def forward(self, x):\n" + "\n".join(f"    {line}" for line in body)
        space = {"torch": torch, "F": nn.functional, "nn": nn}
        exec(source, space)  # noqa: S102 (of the lines above)
        self.source, self._forward = source, space["forward"]

    def forward(self, x: Tensor):
        return self._forward(self, x)


class Around(nn.Module):
    """A sequence of networks, each with its own ``forward`` frame."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor):
        results = []
        for part in self.parts:
            y = part(x)
            x = y[0] if isinstance(y, tuple) else y
            results += y[1:] if isinstance(y, tuple) else []
        return (x, *results)


def block(
    draw: random.Random, channels: int, size: int, *, is_branched: bool, torch_only: bool = False
) -> Builder:
    """Draw the elements of one frame; in a frame with a branch, no normalization is legal."""
    b = Builder(draw, channels, size, torch_only=torch_only)
    for _ in range(draw.randrange(1, 5)):
        element = draw.choice(LEGAL if draw.random() < 0.65 else ILLEGAL)
        if torch_only and element in (with_residual, mixed):
            element = behind_convolution
        element(b)
        if draw.random() < 0.7:
            b.activate()
    if is_branched:
        branch(b)
        for name in b.legal:
            b.illegal[name] = "Python branches in its frame"
        b.legal = []
    return b


def graph(seed: int, *, torch_only: bool = False) -> Graph:
    """Return the network of a seed.

    Args:
        seed: Seed of all random choices.
        torch_only: Whether all layers are those of torch.nn, and in float32.
    """
    draw = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    channels, size = draw.choice(CHANNELS), draw.choice((4, 5))
    x = torch.randn(draw.choice((1, 2, 3)), channels, size, size)
    parts, legal, illegal, sources = [], [], {}, []
    for number in range(draw.choice((1, 1, 2))):
        b = block(draw, channels, size, is_branched=draw.random() < 0.12, torch_only=torch_only)
        channels = b.channels
        part = Random(b)
        for name in b.hooked:
            part.get_submodule(name).register_forward_hook(lambda *_: None)
        parts.append(part)
        legal += [f"parts.{number}.{name}" for name in b.legal]
        illegal |= {f"parts.{number}.{name}": why for name, why in b.illegal.items()}
        sources.append(part.source)
    model = Around(*parts)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            spread = torch.randn_like(tensor)
            tensor.copy_(
                spread * 0.3 + (0.8 * spread.sign() if "norm" in name and "weight" in name else 0)
            )
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn_like(tensor))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    dtypes = {p.dtype for p in model.parameters()}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return Graph(seed, model.eval(), x, legal, illegal, "\n".join(sources), eps)
