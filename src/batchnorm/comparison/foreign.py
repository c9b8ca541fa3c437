"""Comparison of outputs with models without accessible modules: compiled, exported, scripted, ONNX.

Rule: the largest error against a in float64 may be 4 times the largest error of a in its own dtype,
or 4 ulp of the output's scale, whichever is larger.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.comparison.copies import Copy, in_python, plain, seed_all, spacing
from batchnorm.comparison.gaps import Gap, Leaf, leaves
from batchnorm.comparison.result import Difference, Same
from batchnorm.comparison.tape import compare
from batchnorm.compat.modules import is_compiled
from batchnorm.errors import ComparisonError, MissingExtraError, without_codes
from batchnorm.models.examples import Example
from batchnorm.models.preserve import preserved
from batchnorm.models.trees import mapped

TIMES = 4

ONLY_OUTPUTS = """\
expected mode="eval" without gradients= and names= against {kind}, of which only outputs are \
compared"""


@dataclass(frozen=True)
class Runner:
    """An object that can be called like a model.

    Attributes:
        kind: Description of the object.
        run: Arguments -> result.
        by_order: Whether outputs are compared in order, ignoring their names in a.
    """

    kind: str
    run: Callable[[Example], Any]
    by_order: bool = False


def runner(b: Any) -> Runner | None:
    """Return a runner for a compiled, exported, scripted or ONNX model; None for other objects.

    Raises:
        MissingExtraError: If it is an ONNX file and onnxruntime is not installed.
        ComparisonError: If the file does not exist or is damaged.
    """
    if isinstance(b, torch.export.ExportedProgram):
        model = b.module()
        return Runner("an ExportedProgram", lambda call: _call(model, call), by_order=True)
    if isinstance(b, str | PathLike):
        return Runner("an ONNX file", _onnx(Path(fspath(b))), by_order=True)
    if isinstance(b, torch.jit.ScriptModule):
        return Runner("a scripted model", lambda call: _in_eval(b, b, call))
    if isinstance(b, nn.Module) and is_compiled(b):
        return Runner("a compiled model", lambda call: _in_eval(plain("b", b), b, call))
    return None


def same(a: nn.Module, b: Runner, calls: Iterable[Example], tolerance: float | None) -> Same:
    """Compare outputs by the rule of this module, or by a tolerance relative to their scale."""
    wide, own = Copy("a", a, "eval", torch.float64), Copy("a", a, "eval", None)
    u, batches = spacing([a]), 0
    worst: dict[str, tuple[Gap, float, int]] = {}
    largest: list[float | None] = [None, None]
    raised: list[Difference] = []
    for number, example in enumerate(calls):
        batches += 1
        with in_python():
            expected = tuple(leaves(wide.run(example, seed=number).result))
            ours = tuple(leaves(own.run(example, seed=number).result))
        try:
            seed_all(number)
            found = tuple(leaves(b.run(own.given(example))))
        except Exception as error:  # noqa: BLE001 (it is told as a difference)
            text = (without_codes(str(error)).splitlines() or [""])[0]
            words = f"b, {b.kind}, raised {type(error).__name__}: {text}"
            raised.append(_difference("raised", "", Gap(float("inf"), 0.0), 0.0, number, words))
            break
        errors = dict(compare(expected, ours))
        pairs = compare(_plain(expected, b), _plain(found, b))
        for (path, gap), own_gap in zip(pairs, errors.values(), strict=False):
            allowed = TIMES * max(own_gap.error, u * gap.scale)
            if tolerance is not None:
                allowed = tolerance * gap.scale
            allowed = 0.0 if gap.exact else allowed
            before = worst.get(path)
            if before is None or gap.error - allowed > before[0].error - before[1]:
                worst[path] = gap, allowed, number
            for which, one in enumerate((own_gap, gap)):
                if not one.exact and one.scale:
                    largest[which] = max(largest[which] or 0.0, one.error / one.scale)
    if not batches:
        raise ComparisonError("expected at least one batch of data, got none")
    found_differences = [
        _difference("output", path, gap, allowed, number, _words(path, gap, allowed))
        for path, (gap, allowed, number) in worst.items()
        if gap.error > allowed
    ]
    note = f"b is {b.kind}: outputs alone were compared, in the dtype of a"
    return Same((*found_differences, *raised), (note,), (), (largest[0], largest[1]), batches, "eval")  # fmt: skip  # noqa: E501


def _plain(found: tuple[Leaf, ...], b: Runner) -> tuple[Leaf, ...]:
    """Return tensors in order; without names for runners that do not keep them."""
    if not b.by_order:
        return found
    tensors = [value for _, value in found if isinstance(value, Tensor)]
    return tuple((f"[{i}]" if len(tensors) > 1 else "", t) for i, t in enumerate(tensors))


def _words(path: str, gap: Gap, allowed: float) -> str:
    size = gap.words or f"by {gap.error:.3g} from a in float64, where {allowed:.3g} is allowed"
    return f"the model's output{path} differs {size}"


def _difference(
    kind: str, path: str, gap: Gap, allowed: float, number: int, words: str
) -> Difference:
    return Difference("", kind, path, gap.error, allowed, gap.scale, 1.0, number, words)


def _call(model: Any, call: Example) -> Any:
    with torch.no_grad():
        return model(*call.args, **call.kwargs)


def _in_eval(model: nn.Module, outer: nn.Module, call: Example) -> Any:
    with preserved(model), torch.no_grad():
        if model.training:
            model.eval()
        return outer(*call.args, **call.kwargs)


def _onnx(path: Path) -> Callable[[Example], Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "comparing with an ONNX file needs onnxruntime; pip install 'batchnorm[onnx]'"
        ) from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ComparisonError(f"{path} cannot be read as an ONNX file: {error}") from error
    wanted = [one.name for one in session.get_inputs()]

    def run(call: Example) -> Any:
        given = {
            **dict(zip(wanted, _arrays(call.args), strict=False)),
            **{name: array for name, value in call.kwargs.items() for array in _arrays(value)},
        }
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


def _arrays(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(value, lambda tensor: found.append(tensor.detach().cpu().numpy()))
    return found
