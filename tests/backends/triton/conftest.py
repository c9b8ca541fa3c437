"""How tests change the sizes by which the Triton kernels cut tensors into tiles."""

import pytest

from batchnorm.ops.backends.triton import plan


@pytest.fixture
def replan(monkeypatch):
    """A function that sets names of ``plan`` for the test; one number is for all kinds of kernels."""

    def change(**sizes):
        for name, size in sizes.items():
            old = getattr(plan, name)
            new = dict.fromkeys(old, size) if isinstance(old, dict) else size
            monkeypatch.setattr(plan, name, new)
        plan.tiled.cache_clear(), plan.whole.cache_clear()

    yield change
    monkeypatch.undo()
    change()


@pytest.fixture
def long_offsets(replan):
    """A function that has the kernels compute offsets in 64 bits from now on."""
    plan_of = plan._plan
    return lambda: replan(_plan=lambda *given: plan_of(*given)._replace(long=True))
