# The native module, native/bindings.cpp. None means: strides or dtype of a tensor are not served.

from typing import TypeAlias

from torch import Tensor

_Maybe: TypeAlias = Tensor | None
# Group ids, how many groups, weights, and the counts of merged groups; None: no selection.
_Chosen: TypeAlias = tuple[_Maybe, int, _Maybe, _Maybe] | None

def connect(tensor_type: type[Tensor]) -> None: ...
def moments(
    x: Tensor, axis: int, mean: Tensor, m2: Tensor, threads: int, chosen: _Chosen
) -> bool: ...
def normalize(
    x: Tensor,
    residual: _Maybe,
    weight: _Maybe,
    bias: _Maybe,
    mean: Tensor,
    rstd: Tensor,
    axis: int,
    out: _Maybe,
    activation: int,
    slope: float,
    threads: int,
    chosen: _Chosen = None,
) -> _Maybe: ...
def evaluate(
    x: Tensor,
    residual: _Maybe,
    weight: _Maybe,
    bias: _Maybe,
    mean: Tensor,
    var: Tensor,
    axis: int,
    activation: int,
    slope: float,
    eps: float,
    threads: int,
    chosen: _Chosen = None,
) -> _Maybe: ...
def forward(
    x: Tensor,
    residual: _Maybe,
    weight: _Maybe,
    bias: _Maybe,
    axis: int,
    running_mean: _Maybe,
    running_var: _Maybe,
    counter: _Maybe,
    activation: int,
    slope: float,
    eps: float,
    momentum: float,
    threads: int,
    chosen: _Chosen = None,
) -> tuple[Tensor, Tensor] | None: ...
def backward_sums(
    x: Tensor,
    dy: Tensor,
    residual: _Maybe,
    y: _Maybe,
    stats: Tensor,
    axis: int,
    activation: int,
    slope: float,
    threads: int,
    chosen: _Chosen = None,
) -> tuple[Tensor, Tensor] | None: ...
def backward_input(
    x: Tensor,
    dy: Tensor,
    residual: _Maybe,
    y: _Maybe,
    stats: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    axis: int,
    activation: int,
    slope: float,
    count: float,
    want_residual: bool,
    threads: int,
    chosen: _Chosen = None,
) -> tuple[Tensor, _Maybe] | None: ...
def backward(
    x: Tensor,
    dy: Tensor,
    residual: _Maybe,
    y: _Maybe,
    stats: Tensor,
    axis: int,
    activation: int,
    slope: float,
    want_residual: bool,
    threads: int,
    chosen: _Chosen = None,
) -> tuple[Tensor, _Maybe, Tensor, Tensor] | None: ...
def spoil(on: bool) -> None: ...
def simd() -> str: ...
def use_simd(name: str) -> bool: ...
def threading() -> str: ...
def in_forked_child() -> bool: ...
