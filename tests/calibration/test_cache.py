"""What a pass need not do again: the same bits with less work, in bounded memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.calibration.batches import MemoryBudget
from batchnorm.calibration.recording import ModuleCall
from support.calibrated import dense, statistics
from support.combinations import each
from support.third_party import torchvision


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
    for name, value in plain.items():
        assert torch.equal(value, cached[name]), name
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


@pytest.mark.parametrize("size", [1, 500, 3000, 20_000])
def test_memory_stays_within_what_is_given(size, monkeypatch):
    model, data = counted_net(5), torch.randn(80, 6).split(4)
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


def test_all_memory_is_given_back():
    budget = MemoryBudget(1000)
    call = ModuleCall((None, 0), result=torch.zeros(3), taken=12)
    assert budget.take(12)
    call.release(budget)
    call.release(budget)
    assert budget.left == 1000


class Residual(nn.Module):
    """Writes to what it was given, and to what its own layers have returned."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(x)
        z = y * 2
        self.relu(y)
        y = self.second(self.conv(y))
        x.mul_(0.5)
        y += x
        return y + z.mean()


class Skips(nn.Module):
    """A net with long skips, layers used twice, results in tuples, and functional parts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.last = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.BatchNorm2d(4))

    def forward(self, x):
        first = self.a(x)
        y = F.relu(self.n(first), inplace=True)
        y, _ = self.pool(self.b(y))
        y = F.interpolate(self.m(y), size=x.shape[2:])
        y = self.last(self.b(y) + first)
        return y + self.n(self.a(y))


NETS = {
    "inplace residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), *(Residual() for _ in range(3))),
    "flat": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5), nn.Identity(), nn.ReLU(True), nn.Dropout(0.5).eval(),
        nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.ReLU(True), nn.LazyBatchNorm1d(),
    ),
    "skips": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Skips(), Skips()),
    "ours": lambda: bn.convert(torchvision().models.resnet18(num_classes=4)),
    "dense": lambda: torchvision().models.DenseNet(8, (2, 2), 8, num_classes=4),
    "channels last": lambda: torchvision().models.resnet18(num_classes=4).to(
        memory_format=torch.channels_last
    ),
}  # fmt: skip


@each(name=NETS, size=[20_000, 1 << 30])
def test_the_same_bits_in_networks_of_all_kinds(name, size):
    torch.manual_seed(1)
    model = NETS[name]()
    data = [torch.randn(n, 3, 32, 32) for n in (3, 2, 4)]
    model(data[0].clone())  # lazy layers
    assert_the_same_bits(model, data, size)


class Hidden(nn.Module):
    """Hands a tensor to a later module behind everyone's back."""

    def __init__(self, source=None):
        super().__init__()
        self.linear = Counted(6, 6)
        self.seen, self.source = [None], source

    def forward(self, x):
        self.seen[0] = x
        y = self.linear(x)
        return y if self.source is None else y + self.source[0].seen[0]


def test_a_hidden_path_is_noticed_and_then_nothing_is_skipped():
    torch.manual_seed(2)
    first = Hidden()
    second = Hidden()
    second.source = (first,)
    model = nn.Sequential(first, nn.BatchNorm1d(6), second, nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))  # fmt: skip
    data = list(torch.randn(40, 6).split(8))
    assert_the_same_bits(model, data)


def test_random_numbers_hooks_and_buffers_are_left_alone():
    data = torch.randn(40, 6).split(8)
    noisy = counted_net(3)
    noisy[1].append(nn.Dropout(0.5))
    hooked = counted_net(3)
    calls = []
    hooked[0].register_forward_hook(lambda *_: calls.append(1))

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    writes = counted_net(3)
    writes[0].append(Counts())
    assert rows_of(hooked, data, cache_bytes=1 << 30) == rows_of(hooked, data)
    for model in (noisy, hooked, writes):
        start = torch.get_rng_state()
        for size in (0, 1 << 30):
            torch.set_rng_state(start)
            found, _ = calibrated(model, data, cache_bytes=size)
            first = found if not size else first  # noqa: F821
            assert all(torch.equal(value, found[name]) for name, value in first.items())
    assert calls


def test_a_batch_is_recognized_by_its_contents():
    model, x = counted_net(4), torch.randn(80, 6)

    class Shuffled:
        def __iter__(self):
            generator.manual_seed(7 + len(rounds))
            rounds.append(1)
            return iter(x[torch.randperm(80, generator=generator)].split(8))

    generator, found = torch.Generator(), []
    for size in (0, 1 << 30):
        rounds = []
        found.append(calibrated(model, Shuffled(), cache_bytes=size)[0])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_an_iterator_is_kept_first_and_segments_get_what_is_left():
    model, x = counted_net(4), torch.randn(80, 6)
    plain, _ = calibrated(model, x.split(8))
    for size in (x.nbytes, x.nbytes + 2000, 1 << 30):
        found, _ = calibrated(model, iter(x.split(8)), cache_bytes=size)
        assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_an_error_in_a_later_pass_is_the_models_own_and_gives_everything_back():
    class Fails(nn.Module):
        def forward(self, x):
            runs.append(1)
            if len(runs) > 12:
                raise ZeroDivisionError
            return x.clone()

    runs = []
    model = counted_net(2)
    model.append(Fails())
    model.append(nn.BatchNorm1d(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        bn.calibrate(model, torch.randn(80, 6).split(4), upstream="population", cache_bytes=1 << 20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_repeats_are_not_affected():
    model, data = dense(), torch.randn(80, 6).split(8)
    assert_the_same_bits(model, data, passes=3)
