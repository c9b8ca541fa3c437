"""ONNX models: BatchNormalization nodes with their initializers, also in external files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import CheckpointError, MissingExtraError
from batchnorm.storage.checkpoint import Checkpoint, Group, first_line

_OPERATOR, _DEFAULT_EPS = "BatchNormalization", 1e-5
_MEAN = "running_mean"


def open_onnx(path: Path) -> Checkpoint:
    """Open an ONNX model; tensors in external files are read one by one.

    Raises:
        CheckpointError: If it is damaged, or a tensor of a batch norm is not in the model.
        MissingExtraError: If onnx is not installed.
        OSError: If it cannot be read.
    """
    onnx = _onnx()
    try:
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        tensors |= {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant" and node.output
            for attribute in node.attribute
            if attribute.name == "value"
        }
        nodes = _nodes(graph, tensors)
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError is not public
        raise CheckpointError(
            f"{path} is not an ONNX model, or is damaged ({first_line(error)}); export it again"
        ) from error

    def read(name: str) -> Tensor:
        try:
            array = onnx.numpy_helper.to_array(tensors[name], base_dir=str(path.parent))
            return torch.from_numpy(array.copy())
        except Exception as error:  # onnx raises several classes
            raise CheckpointError(
                f"{path}: the tensor {name!r} cannot be read ({first_line(error)}); the model or "
                "an external file is damaged"
            ) from error

    return Checkpoint(
        str(path),
        tuple(tensors),
        lambda name: tuple(tensors[name].dims) if name in tensors else None,
        read,
        nodes,
    )


def _nodes(graph: Any, tensors: dict[str, Any]) -> tuple[Group, ...]:
    """Return the nodes whose statistics are constants of the model."""
    found = []
    for number, node in enumerate(n for n in graph.node if n.op_type == _OPERATOR):
        if len(node.input) < 5 or not all(name in tensors for name in node.input[1:5]):
            continue
        weight, bias, mean, var = node.input[1:5]
        given = {attribute.name: attribute for attribute in node.attribute}
        stem = mean.removesuffix(_MEAN).rstrip("./_") if mean.endswith(_MEAN) else ""
        found.append(
            Group(
                stem or node.name or f"{_OPERATOR}_{number}",
                mean,
                var,
                weight,
                bias,
                eps=given["epsilon"].f if "epsilon" in given else _DEFAULT_EPS,
                training="training_mode" in given and bool(given["training_mode"].i),
            )
        )
    return tuple(found)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtraError(
            "ONNX models need the package onnx; pip install 'batchnorm[onnx]'"
        ) from error
    return onnx
