"""Every test starts from the same random state.

torch is imported in functions: pytest-xdist's main process, which runs no test, starts its workers
3 s earlier without it.
"""

import contextlib
import gc
import inspect
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import support.interpreter  # noqa: F401


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Exclude what exists after the collection of tests from garbage collection: saves 10 % of the time.

    gc.get_referrers does not return frozen objects: of a model that a test file creates on import,
    error messages name a layer by its class alone.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """Deselect tests of backends that cannot run here.

    Without its interpreter, Triton declines the CPU tensors of these tests. Torch's own kernels
    (aten) promise less accuracy than these tests require, and have separate tests.
    """
    left_out = {item for item in items if "aten" in _parameters(item)}
    if not INTERPRETED:
        left_out |= {item for item in items if "triton" in _parameters(item)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    import torch

    if "bias" not in inspect.signature(torch.nn.BatchNorm1d).parameters:
        for item in items:
            options = [v for v in _values(item) if isinstance(v, dict) and "bias" in v]
            if options and "torch" in item.name:
                item.add_marker(pytest.mark.skip(reason="this torch's own layers have no bias="))


def _values(item):
    spec = getattr(item, "callspec", None)
    return () if spec is None else list(spec.params.values())


def _parameters(item):
    return [value for value in _values(item) if isinstance(value, str)]


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    # Without a GPU torch.manual_seed queues calls for one, which takes 2 ms.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)


@pytest.fixture(autouse=True)
def _promised_accuracy():
    """Without the native module, use the reference backend: torch's kernels promise less."""
    from batchnorm.ops.backends.choice import BACKENDS, use_backend

    serving = contextlib.nullcontext() if "cpu" in BACKENDS else use_backend("reference")
    with serving:
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread for small tensors; tests of threads set their number themselves."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def everything_has_a_recipe(monkeypatch):
    """Let save_memory use recipes for small results too."""
    monkeypatch.setattr("batchnorm.memory.recipe.SMALLEST_BYTES", 0)
