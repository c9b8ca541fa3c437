"""ONNX models: nodes of BatchNormalization with their tensors, in the model and beside it."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.errors import CheckpointError
from support import hostile, trained

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

STATE = trained.state("dense")
PARTS = ("weight", "bias", "running_mean", "running_var")


def model(state, constants=False, **attributes):
    """A chain of the two batch norms of a state dict, the first named by its tensors."""
    nodes, tensors, value = [], [], "x"
    for number, layer in enumerate(trained.layers(state)):
        names = [f"{layer}.{part}" if number == 0 else f"onnx::{ord(part[-1])}" for part in PARTS]
        for name, part in zip(names, PARTS, strict=True):
            tensor = numpy_helper.from_array(state[f"{layer}.{part}"].numpy(), name)
            if constants:
                nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            else:
                tensors.append(tensor)
        nodes.append(
            helper.make_node("BatchNormalization", [value, *names], [f"y{number}"], f"/n/{layer}", **attributes)
        )  # fmt: skip
        value = f"y{number}"
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c"])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", "c"])],
        tensors,
    )  # fmt: skip
    return helper.make_model(graph)


# where tensors are -> constants of nodes, file beside the model
PLACES = {"initializers": (False, False), "constants": (True, False), "a file": (False, True)}


@pytest.mark.parametrize("place", PLACES)
def test_an_onnx_model_gives_the_diagnosis_of_its_tensors(place, tmp_path):
    constants, beside = PLACES[place]
    state = STATE | {"2.running_var": STATE["2.running_var"] * 0 - 1}
    path = tmp_path / "model.onnx"
    onnx.save(
        model(state, constants, epsilon=1e-3), path,
        save_as_external_data=beside, location="weights.bin", size_threshold=0,
    )  # fmt: skip
    assert (tmp_path / "weights.bin").exists() is beside
    diagnosis = bn.inspect(path)
    assert [(one.rule, one.subject) for one in diagnosis.findings] == [("BN102", "2")]
    assert [layer.name for layer in diagnosis.layers] == ["2", "/n/5"]
    assert diagnosis.layers[1].eps == pytest.approx(1e-3)
    affine = bn.inspect(STATE).layers[1].affine
    assert diagnosis.layers[1].affine.most_weight == affine.most_weight
    assert diagnosis.layers[1].affine.gain < affine.gain
    assert "BN204" in diagnosis.not_checked and "BN403" not in diagnosis.not_checked


def test_a_node_in_training_mode_is_found(tmp_path):
    onnx.save(model(STATE, training_mode=1), tmp_path / "a.onnx")
    found = bn.inspect(tmp_path / "a.onnx").findings
    assert {(one.rule, one.subject) for one in found} == {("BN403", "2"), ("BN403", "/n/5")}
    onnx.save(model(STATE), tmp_path / "a.onnx")
    assert not bn.inspect(tmp_path / "a.onnx").findings


def test_nodes_whose_statistics_are_computed_are_no_layers(tmp_path):
    made = model(STATE)
    del made.graph.initializer[:]
    onnx.save(made, tmp_path / "a.onnx")
    assert [one.rule for one in bn.inspect(tmp_path / "a.onnx").findings] == ["BN001"]


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "gone.bin"])
def test_tensors_outside_of_the_folder_are_refused(location, tmp_path):
    (tmp_path / "secret").write_bytes(np.ones(64, np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    made = model(STATE)
    for tensor in made.graph.initializer:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    path = folder / "a.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        bn.inspect(path)
    assert str(path) in str(caught.value)


def test_damaged_models_are_read_or_refused_by_name(tmp_path):
    content, path = model(STATE).SerializeToString(), tmp_path / "a.onnx"
    generator, refused = np.random.default_rng(0), 0
    for _ in range(100):
        changed = bytearray(content)
        for at in generator.integers(0, len(content), 3):
            changed[at] = generator.integers(0, 256)
        path.write_bytes(changed[: generator.integers(1, len(content) + 1)])
        found = hostile.judge(path)
        assert found["outcome"] != "crashed" and str(path) in found["message"], found
        refused += found["outcome"] == "refused"
    assert refused > 25
