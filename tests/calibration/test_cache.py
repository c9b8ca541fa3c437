"""What a pass need not do again: the same bits with less work, in bounded memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.calibration.batches import MemoryBudget
from batchnorm.calibration.recording import ModuleCall
from support.calibrated import statistics
from support.lanes import lanes
from support.third_party import torchvision
from support.twins import Calls, assert_close, refused


class Counted(nn.Linear):
    """A Linear that counts the rows it has worked on, of all layers together."""

    rows = 0

    def forward(self, x):
        Counted.rows += len(x)
        return super().forward(x)


def counted_net(depth=8):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(Counted(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True)) for _ in range(depth)
    ]
    return nn.Sequential(*blocks, nn.Linear(6, 2))


def calibrated(model, data, **options):
    model = copy.deepcopy(model)
    result = bn.calibrate(model, data, upstream="population", **options)
    assert not any("forward" in module.__dict__ for module in model.modules())
    return statistics(model), result


def assert_the_same_bits(model, data, cache_bytes=1 << 30, **options):
    plain, a = calibrated(model, data, **options)
    cached, b = calibrated(model, data, cache_bytes=cache_bytes, **options)
    assert_close(cached, plain, exact=True)
    assert (a.passes, a.batches, a.samples) == (b.passes, b.batches, b.samples)


def rows_of(model, data, **options):
    Counted.rows = 0
    calibrated(model, data, **options)
    return Counted.rows


def test_a_later_pass_does_not_run_the_earlier_layers_again():
    model, data = counted_net(8), torch.randn(80, 6).split(4)
    assert_the_same_bits(model, data)
    plain, cached = (rows_of(model, data, cache_bytes=size) for size in (0, 1 << 30))
    # A batch is followed in full. A pass for layer k runs up to the call of layer k + 1.
    assert plain == 8 * 4 + (2 + 3 + 4 + 5 + 6 + 7 + 8 + 8) * 80
    # With the cache only the last two of these; and the first batch in full, as a check.
    assert cached == 8 * 4 + (7 * 2 + 1) * 80 + (3 + 4 + 5 + 6 + 7 + 8 + 8) * 4


@pytest.mark.parametrize("size", [1, 3000])
def test_a_cache_takes_no_more_than_cache_bytes(size, monkeypatch):
    model, data = counted_net(5), torch.randn(40, 6).split(4)
    lowest = []
    take = MemoryBudget.take

    def watched(budget, some):
        taken = take(budget, some)
        lowest.append(budget.left)
        return taken

    monkeypatch.setattr(MemoryBudget, "take", watched)
    assert_the_same_bits(model, data, size)
    assert min(lowest) >= 0
    full = rows_of(model, data)
    assert rows_of(model, data, cache_bytes=size) <= full + (3 + 4 + 5 + 5) * 4


def test_releasing_a_recorded_call_twice_gives_its_bytes_back_once():
    budget = MemoryBudget(1000)
    call = ModuleCall((None, 0), result=torch.zeros(3), taken=12)
    assert budget.take(12)
    call.release(budget)
    call.release(budget)
    assert budget.left == 1000


def write_in_place(m, x):
    """Write to what was given, and to what its own layers have returned."""
    y = m.norm(x)
    z = y * 2
    m.relu(y)
    y = m.second(m.conv(y))
    x.mul_(0.5)
    y += x
    return y + z.mean()


def residual():
    norms = {"norm": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4)}
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return Calls(write_in_place, conv=conv, relu=nn.ReLU(inplace=True), **norms)


def skip(m, x):
    """Long skips, layers used twice, results in tuples, and functional parts."""
    first = m.a(x)
    y = F.relu(m.n(first), inplace=True)
    y, _ = m.pool(m.b(y))
    y = F.interpolate(m.m(y), size=x.shape[2:])
    y = m.last(m.b(y) + first)
    return y + m.n(m.a(y))


def skipping():
    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1)}
    parts |= {"n": nn.BatchNorm2d(4), "m": nn.BatchNorm2d(4)}
    last = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    return Calls(skip, pool=nn.MaxPool2d(2, return_indices=True), last=last, **parts)


def small_resnet():
    """Return a ResNet of one block per stage."""
    resnet = torchvision().models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


NETS = {
    "inplace residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), *(residual() for _ in range(3))),
    "flat": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5), nn.Identity(), nn.ReLU(True), nn.Dropout(0.5).eval(),
        nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.ReLU(True), nn.LazyBatchNorm1d(),
    ),
    "skips": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), skipping(), skipping()),
    "ours": lambda: bn.convert(small_resnet()),
    "dense": lambda: torchvision().models.DenseNet(8, (2, 2), 8, num_classes=4),
    "channels last": lambda: small_resnet().to(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("size", [20_000, 1 << 30])
@pytest.mark.parametrize("name", lanes(NETS, fast=["inplace residual", "flat"], slow=NETS))
def test_the_same_bits_in_networks_of_all_kinds(name, size):
    torch.manual_seed(1)
    model = NETS[name]()
    data = [torch.randn(n, 3, 16, 16) for n in (3, 2, 4)]
    model(data[0].clone())  # lazy layers
    assert_the_same_bits(model, data, size, passes=3 if name == "skips" else None)


def test_no_module_is_skipped_where_a_module_reads_an_attribute_of_another():
    """A module hands a tensor to a later one by an attribute."""
    torch.manual_seed(2)
    first = Calls(lambda m, x: (setattr(m, "seen", x), m.linear(x))[1], linear=Counted(6, 6))
    call = lambda m, x: m.linear(x) + m.source[0].seen
    second = Calls(call, linear=Counted(6, 6), source=(first,))
    model = nn.Sequential(first, nn.BatchNorm1d(6), second, nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))  # fmt: skip
    assert_the_same_bits(model, torch.randn(40, 6).split(8))


def test_random_numbers_hooks_and_buffers_are_the_same_with_a_cache():
    noisy, hooked, writes = (counted_net(3) for _ in range(3))
    noisy[1].append(nn.Dropout(0.5))
    hooked[0].register_forward_hook(lambda *_: None)
    writes[0].append(Calls(lambda m, x: x * m.calls.add_(1), calls=nn.Buffer(torch.zeros(()))))
    data = torch.randn(40, 6).split(8)
    for model in (noisy, hooked, writes):
        assert_the_same_bits(model, data)
    assert rows_of(hooked, data, cache_bytes=1 << 30) == rows_of(hooked, data)


class Shuffled:
    """The same rows in another order each time."""

    def __init__(self, x):
        self.x, self.rounds = x, 0

    def __iter__(self):
        self.rounds += 1
        generator = torch.Generator().manual_seed(self.rounds)
        return iter(self.x[torch.randperm(len(self.x), generator=generator)].split(8))


def test_a_batch_is_recognized_by_its_contents():
    model, x = counted_net(4), torch.randn(80, 6)
    found = [calibrated(model, Shuffled(x), cache_bytes=size)[0] for size in (0, 1 << 30)]
    assert_close(*found, exact=True)


def test_an_iterator_is_kept_first_and_segments_get_what_is_left():
    model, x = counted_net(4), torch.randn(80, 6)
    plain, _ = calibrated(model, x.split(8))
    for size in (x.nbytes, x.nbytes + 2000, 1 << 30):
        found, _ = calibrated(model, iter(x.split(8)), cache_bytes=size)
        assert_close(found, plain, exact=True)


def test_an_error_of_a_module_in_a_later_pass_leaves_the_model_unchanged():
    runs = []

    def fails(m, x):
        runs.append(1)
        if len(runs) > 12:
            raise ZeroDivisionError
        return x.clone()

    model = counted_net(2).append(Calls(fails)).append(nn.BatchNorm1d(2))
    with refused(ZeroDivisionError, "", model):
        bn.calibrate(model, torch.randn(80, 6).split(4), upstream="population", cache_bytes=1 << 20)
