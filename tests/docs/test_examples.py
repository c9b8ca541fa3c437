"""The examples do what the pages say of them."""

import importlib
import sys
from pathlib import Path

import pytest

from support.lanes import lanes

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


# Name -> its options, what is better than what, and by how much at least.
EXAMPLES_OF = {
    "averaged_weights": ({}, ("merge_states", "calibrate"), "as AveragedModel leaves it", 0.0),
    "pruned": ({"steps": 100}, ("pruned, calibrated",), "pruned", 0.1),
    "quantized": ({"steps": 100}, ("2 bits, calibrated",), "2 bits", 0.1),
    "merged_adapter": ({"steps": 100}, ("merged, calibrated",), "merged", 0.3),
    "schedule_free": ({}, ("calibrate",), "as the optimizer leaves it", 0.1),
}


@pytest.mark.parametrize("name", lanes(EXAMPLES_OF, fast=["pruned"], slow=EXAMPLES_OF))
def test_an_example_gains_accuracy_by_exact_statistics(example, name):
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    options, better, worse, margin = EXAMPLES_OF[name]
    found = example(name).main(**options)
    assert min(found[key] for key in better) > found[worse] + margin


def test_the_example_at_the_end_of_an_epoch(example):
    seen = example("epoch_end").main(epochs=1)
    assert seen[0][1] > seen[0][0]


@pytest.mark.filterwarnings("ignore")
def test_the_example_that_quantizes_by_pt2e(example):
    pytest.importorskip("torchao")
    trained, frozen, folded, quantized = example("quantized_by_export").main(steps=100).values()
    assert frozen == folded
    assert min(frozen, quantized) > trained - 0.02 > 0.9
