"""The grammar of generated sources: all of it is accepted, nothing else is."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from hybrid_fx.errors import CacheError
from hybrid_fx.plan.plan import load_functions
from hybrid_fx.plan.source_check import MAX_CALLS, MAX_CHARACTERS, TORCH_CONSTANTS, check_source

OPERATORS = ("linear", "getitem", "pair", "to")

LEGAL = '''
"""Decode of a toy model."""
# B batch, E hidden size

def layer(x, w, bias):
    """One layer."""
    a, b = op.pair(x, dim=-1)  # [B, 2]
    y = op.getitem(a, (..., None, slice(0, 2), slice(None, -1, 1)))
    del a, b
    op.to(y, op.bfloat16)
    z = op.to(op.linear(y, w, bias=bias), "cpu", memory_format=op.contiguous_format)
    return {"z": z, 1: [-z, -1, -2.5, -inf, nan, Ellipsis, True, None, 1e-6, -9223372036854775808]}

def decode(x, weights, kv):
    _, x = layer(x, *weights[3])
    x = layer(x, weights[0][1], *kv)
    x = layer(*x, *kv[0][2])
    return ()
'''


def refused(source: str) -> str:
    with pytest.raises(CacheError) as caught:
        check_source(source, OPERATORS)
    return str(caught.value)


def body(*lines: str) -> str:
    """A module whose only function takes x and w; the first of ``lines`` is line 2."""
    return "def f(x, w):\n" + "".join(f"    {line}\n" for line in lines)


def test_a_source_that_uses_the_whole_grammar_is_accepted_and_compiles():
    tree = check_source(LEGAL, OPERATORS)
    compile(tree, "<test>", "exec")
    assert [node.name for node in tree.body[1:]] == ["layer", "decode"]


HOSTILE_EXPRESSIONS = Path(__file__).with_name("hostile_expressions.txt").read_text("utf-8")


@pytest.mark.parametrize("expression", HOSTILE_EXPRESSIONS.splitlines())
def test_a_hostile_expression_is_refused_with_its_line(expression):
    assert "line 3" in refused(body("y = op.linear(x, w)", f"return {expression}"))


HOSTILE_STATEMENTS = """
import os
from os import system
import os as op
y = z = x
y: int = x
y: int
y += x
x[0] = w
x.data = w
op.linear = x
op = x
slice = x
inf = x
nan, y = x
op, y = x
__builtins__ = x
__import__ = x
__y = x
yé = x
f = x
*y, z = x
[y, z] = x
(y, z), a = x
() = x
del x[0]
del x.data
del op
del (x, w)
del y
del inf
del f
x
"text"
1
()
return
pass
global x
nonlocal x
raise x
assert x
break
if x: op.linear(x)
for i in x: op.linear(i)
while True: op.linear(x)
with x: op.linear(x)
try: op.linear(x)\nexcept: op.linear(w)
match x:\n  case 1: op.linear(x)
def g(): return x
async def g(): return x
class g: y = x
lambda: x
await x
yield x
print(x)
type y = int
""".strip().splitlines()


@pytest.mark.parametrize("statement", HOSTILE_STATEMENTS)
def test_a_hostile_statement_is_refused_with_its_line(statement):
    lines = statement.replace("\\n", "\n").splitlines()
    message = refused(body("y_ = op.linear(x, w)", *lines))
    assert "line 3" in message or "line 4" in message


HOSTILE_MODULES = {
    "an import": "import os\ndef f(x):\n    return x\n",
    "a call at the top": "op.linear(1)\ndef f(x):\n    return x\n",
    "an assignment at the top": "y = 1\ndef f(x):\n    return x\n",
    "a class": "class f:\n    y = 1\n",
    "an async function": "async def f(x):\n    return x\n",
    "a decorator": "@op.linear\ndef f(x):\n    return x\n",
    "a default": "def f(x=1):\n    return x\n",
    "a mutable default": "def f(x=[op.linear(1)]):\n    return x\n",
    "a keyword-only parameter": "def f(*, x):\n    return 1\n",
    "a positional-only parameter": "def f(x, /):\n    return 1\n",
    "a star parameter": "def f(*x):\n    return 1\n",
    "a double star parameter": "def f(**x):\n    return 1\n",
    "an annotation": "def f(x: op.linear(1)):\n    return x\n",
    "a return annotation": "def f(x) -> op.linear(1):\n    return x\n",
    "a parameter twice": "def f(x, x):\n    return x\n",
    "a reserved parameter": "def f(op):\n    return op.linear(1)\n",
    "a dunder parameter": "def f(__x):\n    return 1\n",
    "a dunder function": "def __getattr__(x):\n    return x\n",
    "a reserved function": "def slice(x):\n    return x\n",
    "a function twice": "def f(x):\n    return x\ndef f(x):\n    return x\n",
    "a parameter that is a function": "def g(x):\n    return x\ndef f(g):\n    return g(1)\n",
    "a keyword twice": "def f(x):\n    return op.linear(a=x, a=x)\n",
    "keywords for a function": "def g(x):\n    return x\ndef f(x):\n    return g(x, y=x)\n",
    "too few arguments": "def g(x, y):\n    return x\ndef f(x):\n    return g(x)\n",
    "a call upwards": "def f(x):\n    return g(x)\ndef g(x):\n    return x\n",
    "recursion": "def f(x):\n    return f(x)\n",
    "use after del": "def f(x):\n    del x\n    return x\n",
    "no function": '"""Only a docstring."""\n',
    "nothing": "",
    "a null byte": "def f(x):\n    return x\0\n",
    "half a file": LEGAL[: len(LEGAL) // 2],
    "a lone surrogate": "def f(x):\n    return '\ud800'\n",
    "deep brackets": "def f(x):\n    return " + "(" * 90 + "x" + ",)" * 90 + "\n",
    "very deep brackets": "def f(x):\n    return " + "(" * 9999 + ")" * 9999 + "\n",
    "very deep minus": "def f(x):\n    return " + "-" * 99999 + "1\n",
    "a very long chain": "def f(x):\n    return x" + "()" * 99999 + "\n",
    "a long number": "def f(x):\n    return " + "9" * 9999 + "\n",
    "a very long text": LEGAL + "#" * MAX_CHARACTERS,
}


@pytest.mark.parametrize("kind", HOSTILE_MODULES)
def test_a_hostile_module_is_refused(kind):
    assert "generated source" in refused(HOSTILE_MODULES[kind])


def doubling(depth: int) -> str:
    """Functions that each call the one above twice: 2**depth calls of an operator."""
    text = "def f0(x):\n    return op.linear(x)\n"
    for level in range(1, depth + 1):
        text += f"def f{level}(x):\n    return f{level - 1}(f{level - 1}(x))\n"
    return text


def test_a_chain_of_functions_that_would_run_for_ages_is_refused_without_running_it():
    assert 2**12 < MAX_CALLS < 2**64
    check_source(doubling(12), OPERATORS)
    assert "calls in one run" in refused(doubling(64))


def test_nothing_of_a_refused_source_runs(tmp_path):
    ran = []
    touched = tmp_path / "touched"
    for line in (
        "op.ran()",
        f"open({str(touched)!r}, 'w')",
        f"import os; os.mkdir({str(touched)!r})",
        "@op.ran\ndef g(x):\n    return x",
        "def g(x=op.ran()):\n    return x",
    ):
        with pytest.raises(CacheError):
            load_functions(f"{line}\ndef f(x):\n    return x\n", {"ran": lambda: ran.append(1)})
    assert not ran
    assert not touched.exists()


def test_the_torch_constants_are_canonical_names_of_dtypes_formats_and_layouts():
    for name in ("float32", "bfloat16", "int64", "bool", "contiguous_format", "strided"):
        assert str(TORCH_CONSTANTS[name]) == f"torch.{name}"
    for alias in ("float", "half", "long", "int", "double"):
        assert alias not in TORCH_CONSTANTS


def test_indentation_and_position_of_the_mistake_are_reported():
    text = textwrap.dedent(
        """\
        def f(x):
            y = op.linear(x)

            return y.data
        """
    )
    assert "line 4: attribute 'data'" in refused(text)
