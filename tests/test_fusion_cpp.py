"""A normalization's output in the hands of C++ extensions, which ask for no ``__torch_function__``."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension

import batchnorm as bn
from fused import run
from test_fusion_consumers import LESSONS, Taught, compare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("everything_is_large_enough")]

SOURCE = """
#include <torch/extension.h>
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

torch::Tensor composed(torch::Tensor y) { return y * 3 + y * y; }

struct Triple : torch::autograd::Function<Triple> {
  static torch::Tensor forward(AutogradContext* ctx, torch::Tensor y) {
    ctx->save_for_backward({y});
    return y * 3 + y * y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    auto y = ctx->get_saved_variables()[0];
    return {dy[0] * (3 + 2 * y)};
  }
};
torch::Tensor function(torch::Tensor y) { return Triple::apply(y); }

double first(torch::Tensor y) { return y.data_ptr<float>()[0]; }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("composed", &composed);
  m.def("function", &function);
  m.def("first", &first);
}
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    with warnings.catch_warnings(action="ignore"):
        return cpp_extension.load_inline(
            "bn_consumers", SOURCE, build_directory=str(tmp_path_factory.mktemp("cpp"))
        )


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("name", ["composed", "function"])
def test_values_and_gradients(extension, name, lesson):
    consume = getattr(extension, name)
    for rest in (
        lambda s, y, r: consume(y),
        lambda s, y, r: consume(y) + F.relu(y),
        lambda s, y, r: F.relu(y) + consume(y),
        lambda s, y, r: consume(y + r),
    ):
        model = Taught(rest)
        model.lesson = LESSONS[lesson]
        compare(model)


def test_a_pointer_into_memory_is_right_or_an_error(extension):
    model = Taught(lambda s, y, r: F.relu(y) * extension.first(y))
    theirs = copy.deepcopy(model)
    bn.convert(model)
    for one in (model, theirs):
        one.teach = False
    x, r = torch.randn(2, 3, 4, 6, 6)
    got, expected = (run(m, x, r, torch.float32) for m in (model, theirs))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="not allocated"):
        model(x, r)
