"""The examples do what the pages say of them."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_example_at_the_end_of_an_epoch(example):
    seen = example("epoch_end").main(epochs=1)
    assert seen[0][1] > seen[0][0]


def test_the_example_with_averaged_weights(example):
    found = example("averaged_weights").main()
    assert min(found["merge_states"], found["calibrate"]) > found["as AveragedModel leaves it"]


def test_the_example_with_a_pruned_model(example):
    found = example("pruned").main(steps=100)
    assert found["pruned, calibrated"] > found["pruned"] + 0.1


def test_the_example_with_a_quantized_model(example):
    found = example("quantized").main(steps=100)
    assert found["2 bits, calibrated"] > found["2 bits"] + 0.1


def test_the_example_with_a_merged_adapter(example):
    found = example("merged_adapter").main(steps=100)
    assert found["merged, calibrated"] > found["merged"] + 0.3


def test_the_example_with_a_schedule_free_optimizer(example):
    pytest.importorskip("schedulefree")
    found = example("schedule_free").main()
    assert found["calibrate"] > found["as the optimizer leaves it"] + 0.1


@pytest.mark.filterwarnings("ignore")
def test_the_example_that_quantizes_by_pt2e(example):
    pytest.importorskip("torchao")
    trained, frozen, folded, quantized = example("quantized_by_export").main(steps=100).values()
    assert frozen == folded
    assert min(frozen, quantized) > trained - 0.02 > 0.9
