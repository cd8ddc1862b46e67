"""Functions of a checked source: they compute it, and can name nothing else."""

from __future__ import annotations

import inspect
import operator
import traceback

import pytest
import torch
import torch.nn.functional as F

from hybrid_fx.plan.plan import OperatorTable, load_functions

SOURCE = '''"""A toy."""

def layer(x, w):
    y = op.linear(x, w)
    return op.masked_fill(y, op.lt(y, 0.0), -inf)

def decode(x, weights):
    x = layer(x, *weights[0])
    return op.getitem(x, (..., slice(0, 1)))
'''
OPERATORS = {
    "linear": F.linear,
    "masked_fill": torch.masked_fill,
    "lt": operator.lt,
    "getitem": operator.getitem,
    "to": torch.Tensor.to,
}


def test_loaded_functions_compute_what_the_source_says():
    functions = load_functions(SOURCE, OPERATORS)
    assert list(functions) == ["layer", "decode"]
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    y = F.linear(x, w)
    expected = y.masked_fill(y < 0, float("-inf"))[..., :1]
    assert torch.equal(functions["decode"](x, [[w]]), expected)


def test_dtypes_infinities_and_nan_have_their_values():
    source = "def f(x):\n    return (op.to(x, op.float64), inf, -inf, nan, op.bool)\n"
    x, positive, negative, nan, kind = load_functions(source, OPERATORS)["f"](torch.ones(1))
    assert x.dtype is torch.float64
    assert (positive, negative, kind) == (float("inf"), float("-inf"), torch.bool)
    assert nan != nan


def test_loaded_functions_can_name_no_builtin():
    functions = load_functions(SOURCE, OPERATORS)
    names = set(functions["layer"].__globals__)
    assert names == {
        "__builtins__", "__name__", "__doc__", "op", "slice", "inf", "nan", "Ellipsis", "layer",
        "decode",
    }  # fmt: skip
    # The one entry is for C code, which imports through it; no legal name spells it.
    assert set(functions["layer"].__globals__["__builtins__"]) == {"__import__"}


def test_the_operator_table_is_exactly_the_operators_and_the_torch_constants_and_read_only():
    table = load_functions(SOURCE, OPERATORS)["layer"].__globals__["op"]
    assert isinstance(table, OperatorTable)
    callables = {name: value for name, value in vars(table).items() if callable(value)}
    assert callables == OPERATORS
    with pytest.raises(AttributeError, match="read only"):
        table.linear = None
    with pytest.raises(AttributeError, match="read only"):
        del table.linear


@pytest.mark.parametrize("name", ["float32", "bool", "__class__", "not a name", "a.b"])
def test_an_operator_name_that_a_source_could_not_mean_is_a_value_error(name):
    with pytest.raises(ValueError, match="rename"):
        load_functions(SOURCE, {**OPERATORS, name: F.linear})


def test_a_debugger_and_a_traceback_find_the_text_of_a_loaded_function():
    functions = load_functions(SOURCE, OPERATORS, name="decode")
    assert inspect.getsource(functions["layer"]).startswith("def layer(x, w):\n    y = op.linear")
    assert functions["layer"].__code__.co_filename.startswith("<hybrid_fx decode ")
    with pytest.raises(TypeError) as caught:
        functions["layer"](1, 2)
    assert "y = op.linear(x, w)" in "".join(traceback.format_exception(caught.value))


def test_two_sources_of_one_name_keep_their_own_text():
    first = load_functions("def f(x):\n    return x\n", {}, name="decode")["f"]
    second = load_functions("def f(y):\n    return y\n", {}, name="decode")["f"]
    assert "return x" in inspect.getsource(first)
    assert "return y" in inspect.getsource(second)
