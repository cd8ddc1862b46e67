"""Random programs of the grammar are accepted; made hostile or damaged they are refused."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_fx.errors import CacheError
from hybrid_fx.plan.plan import load_functions
from hybrid_fx.plan.source_check import TORCH_CONSTANTS, check_source

OPERATORS = ("linear", "getitem", "pair", "to")
HOSTILE = Path(__file__).with_name("hostile_expressions.txt").read_text("utf-8").splitlines()

NAMES = st.sampled_from(["a", "b", "c", "d_1", "_", "_e"])
LITERALS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5).filter(lambda text: text.isprintable()),
).map(repr)
KEYWORDS = st.lists(st.sampled_from(["dim={}", "p={}"]), unique=True)


@st.composite
def expressions(draw, bound: list[str], above: dict[str, int], depth: int = 0) -> str:
    """An expression of the grammar over the variables ``bound`` and the functions ``above``."""
    leaf = [
        LITERALS,
        st.sampled_from(["...", "inf", "-inf", "nan", "Ellipsis", "op.float32", "op.bool"]),
    ]
    if bound:
        variable = st.sampled_from(bound)
        leaf += [variable, variable.map("-{}".format)]
        leaf += [variable.map("{}[0]".format), variable.map("{}[2][1]".format)]
    if depth == 2 or draw(st.booleans()):
        return draw(st.one_of(leaf))
    inner = expressions(bound, above, depth + 1)
    items = draw(st.lists(inner, max_size=3))
    if bound and draw(st.booleans()):
        stars = [draw(st.sampled_from(["*{}", "*{}[1]", "*{}[1][2]"])).format(draw(variable))]
    else:
        stars = []
    keywords = [form.format(draw(inner)) for form in draw(KEYWORDS)]
    operator = draw(st.sampled_from(OPERATORS))
    forms = [
        f"({''.join(item + ', ' for item in items)})",
        f"[{', '.join(items)}]",
        "{" + ", ".join(f"{key}: {item}" for key, item in enumerate(items)) + "}",
        f"slice({', '.join(items or ['None'])})",
        f"op.{operator}({', '.join(items + stars + keywords)})",
    ]
    for name, arity in above.items():
        forms.append(f"{name}({', '.join(draw(inner) for _ in range(arity))})")
    return draw(st.sampled_from(forms))


@st.composite
def programs(draw) -> list[str]:
    """The lines of a legal module. Every function ends in a return."""
    lines = draw(st.sampled_from([[], ['"""A module."""'], ["# a comment"]]))
    lines = list(lines)
    above: dict[str, int] = {}
    for index in range(draw(st.integers(1, 3))):
        parameters = draw(st.lists(NAMES, max_size=3, unique=True))
        bound = list(parameters)
        lines.append(f"def f{index}({', '.join(parameters)}):")
        for _ in range(draw(st.integers(0, 4))):
            value = draw(expressions(bound, above))
            form = draw(st.integers(0, 3))
            if form == 0 and bound:
                gone = draw(st.sampled_from(bound))
                bound.remove(gone)
                lines.append(f"    del {gone}")
            elif form == 1:
                first, second = draw(NAMES), draw(NAMES)
                lines.append(f"    {first}, {second} = op.pair({value})")
                bound = sorted({*bound, first, second})
            elif form == 2:
                lines.append(f"    op.linear({value})")
            else:
                name = draw(NAMES)
                lines.append(f"    {name} = {value}")
                bound = sorted({*bound, name})
        lines.append(f"    return {draw(expressions(bound, above))}")
        above[f"f{index}"] = len(parameters)
    return lines


class Anything:
    """Stands for any tensor: can be negated, indexed and unpacked into nothing."""

    def __neg__(self):
        return self

    def __getitem__(self, index):
        if index > 2:
            raise IndexError(index)
        return self


@settings(deadline=None, max_examples=60)
@given(lines=programs())
def test_every_program_of_the_grammar_is_accepted_and_never_meets_an_unbound_name(lines):
    table = dict.fromkeys(OPERATORS, lambda *args, **kwargs: Anything())
    table["pair"] = lambda *args, **kwargs: (Anything(), Anything())
    functions = load_functions("\n".join(lines), table)
    for function in functions.values():
        arguments = [Anything()] * function.__code__.co_argcount
        # -None, 1[0] and the like may fail; a NameError fails the test.
        with contextlib.suppress(TypeError, IndexError, KeyError):
            function(*arguments)


@settings(deadline=None, max_examples=100)
@given(
    lines=programs(),
    hostile=st.sampled_from(HOSTILE),
    wrap=st.sampled_from(
        [
            "return {}",
            "a = {}",
            "a, b = {}",
            "a = ({}, 1)",
            "a = [1, {}]",
            "a = {{1: {}}}",
            "a = slice({})",
            "op.linear({})",
            "op.linear(1, dim={})",
            "a = op.linear(op.to([({},)]))",
        ]
    ),
    data=st.data(),
)
def test_a_hostile_expression_is_refused_wherever_it_stands(lines, hostile, wrap, data):
    if hostile.startswith("*") and "op.linear({})" in wrap:
        hostile = "*" + hostile  # a single star is legal there
    if hostile == "f(x, w)":
        hostile = "f9(1)"
    spots = [at for at, line in enumerate(lines) if line.startswith("    ")]
    at = data.draw(st.sampled_from(spots))
    # x and w are made variables, so that what is refused is the construct and not the name.
    hurt = [*lines[:at], "    x = 1", "    w = 2", "    " + wrap.format(hostile), *lines[at:]]
    with pytest.raises(CacheError):
        check_source("\n".join(hurt), OPERATORS)


ALLOWED_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Delete, ast.Return,
    ast.Expr, ast.Name, ast.Constant, ast.UnaryOp, ast.USub, ast.Tuple, ast.List, ast.Dict,
    ast.Subscript, ast.Attribute, ast.Call, ast.keyword, ast.Starred, ast.expr_context,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    lines=programs(),
    insert=st.sampled_from(
        [".", "_", "__", "(", ")", "[", "]", "*", "**", ",", "=", ":", ":=", "=lambda:", " if ",
         " for a in ", "f", "op", "op.", ".op", "getattr", "\n", "\n    ", ";", "#", "'", "\\", "-"]
    ),
    data=st.data(),
)  # fmt: skip
def test_damaged_text_is_a_cache_error_or_still_of_the_grammar(lines, insert, data):
    text = "\n".join(lines)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 3))
    text = text[:at] + insert + text[at + cut :]
    try:
        tree = check_source(text, OPERATORS)
    except CacheError:
        return
    compile(tree, "<test>", "exec")
    for node in ast.walk(tree):
        assert isinstance(node, ALLOWED_NODES)
        if isinstance(node, ast.Attribute):
            assert isinstance(node.value, ast.Name)
            assert node.value.id == "op"
            assert node.attr in OPERATORS or node.attr in TORCH_CONSTANTS
        if isinstance(node, ast.Name):
            assert not node.id.startswith("__")
