"""bn.verify: what passes on this machine, and that a wrong backend does not."""

import itertools

import pytest
import torch

import batchnorm as bn
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.choice import BACKENDS
from batchnorm.verification.comparisons import laws, of_backend, selections
from support.command import run

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_backend_passes_on_the_cpu_and_the_command_says_so():
    done = run("env", "--check")
    assert done.exit_code == 0, done.stdout
    assert "all are within their bounds" in done.stdout
    for name in BACKENDS:
        assert f'backend "{name}"' in done.stdout


def test_laws_and_selections_are_within_their_bounds():
    assert [found for found in (*laws(CPU), *selections(CPU)) if not found.worst <= 1] == []


class Off:
    """A backend whose function ``wrong`` returns tensors changed by ``change``."""

    commits = reads_output = False

    def __init__(self, wrong, change):
        self.wrong, self.change = wrong, change

    def __getattr__(self, name):
        def changed(*given):
            found = function(*given)
            if isinstance(found, tuple):
                return (self.change(found[0]), *found[1:])
            return self.change(found)

        function = getattr(reference, name)
        return changed if name == self.wrong else function


@pytest.mark.parametrize(
    ("wrong", "change", "named"),
    [
        ("forward", lambda y: y + 1e-5, "output"),
        ("backward", lambda dx: dx * (1 + 1e-5), "gradient of the input"),
        ("evaluate", lambda y: torch.full_like(y, torch.nan), "evaluation"),
    ],
)
def test_a_wrong_backend_is_found(monkeypatch, wrong, change, named):
    monkeypatch.setitem(BACKENDS, "mine", Off(wrong, change))
    found = list(itertools.islice(of_backend("mine")(CPU), 32))
    failed = {one.what.partition(":")[0] for one in found if not one.worst <= 1}
    assert failed == {named}


def test_a_backend_that_does_not_serve_the_device_is_skipped_with_its_reason(monkeypatch):
    elsewhere = Off("serves", lambda _: "it serves none")
    for name in list(BACKENDS):
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, "mine", elsewhere)
    found = bn.verify()
    assert found.passed
    assert "it serves none" in found.checks[-1].skipped


def test_a_device_that_is_not_there_is_an_error():
    words = "expected a device of this torch, got 'cuda:99'"
    with pytest.raises(bn.errors.DeviceError, match=words):
        bn.verify("cuda:99")
    assert run("env", "--check", "--device", "nonsense").exit_code == 2
