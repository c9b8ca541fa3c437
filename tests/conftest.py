"""Every test starts from the same random state."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors gain nothing from more; tests that are about threads set their number."""
    torch.set_num_threads(1)


@pytest.fixture
def everything_is_large_enough(monkeypatch):
    """Fuse inputs of any size, on one thread."""
    keys = [(adds, training) for adds in (True, False) for training in (True, False)]
    monkeypatch.setattr("batchnorm.fusion.layer.SMALLEST", dict.fromkeys(keys, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
