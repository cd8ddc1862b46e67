"""Patterns and the matcher."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_graphs import Builder
from torch import fx

from hybrid_fx.passes.pattern import Any, Call, Const, Either, Match, NoMatch, Opt, match


def _two() -> tuple[Builder, fx.Node, fx.Node]:
    build = Builder()
    return build, build.input("x", 2, 3), build.input("y", 2, 3)


def test_commutative_arguments_match_in_either_order() -> None:
    build, x, y = _two()
    pattern = Call("add", Call("neg", Any("a")), Any("b"), commutes=True)
    for args in ((build.call("neg", x), y), (y, build.call("neg", x))):
        found = match(pattern, build.call("add", *args))
        assert isinstance(found, Match)
        assert (found["a"], found["b"]) == (x, y)


def test_arguments_keep_their_order_where_a_call_does_not_commute() -> None:
    build, x, y = _two()
    pattern = Call("sub", Call("neg", Any("a")), Any("b"))
    assert match(pattern, build.call("sub", build.call("neg", x), y))
    assert not match(pattern, build.call("sub", y, build.call("neg", x)))


def test_the_first_alternative_that_fits_is_taken() -> None:
    build, x, _ = _two()
    pattern = Either(Call("exp", Any("a")), Call("neg", Any("b")), Any("c"))
    assert match(pattern, build.call("neg", x)).bindings == {"b": x}  # type: ignore[union-attr]
    assert set(match(pattern, build.call("exp", x)).bindings) == {"a"}  # type: ignore[union-attr]


def test_a_later_alternative_is_tried_where_the_first_binds_what_fails_elsewhere() -> None:
    build, x, y = _two()
    root = build.call("add", build.call("mul", x, y), y)
    either = Either(Call("mul", Any("a"), Any()), Call("mul", Any(), Any("a")))
    pattern = Call("add", either, Any("a"))
    found = match(pattern, root)
    assert isinstance(found, Match)
    assert found["a"] is y


def test_one_name_binds_one_node() -> None:
    build, x, y = _two()
    square = Call("mul", Any("a"), Any("a"))
    assert match(square, build.call("mul", x, x))
    assert not match(square, build.call("mul", x, y))
    twins = build.call("mul", build.call("neg", x), build.call("neg", x))
    assert not match(square, twins), "two calls that compute the same are two nodes"


def test_one_name_binds_equal_constants_of_one_type() -> None:
    build, x, _ = _two()
    pattern = Call("add", Call("mul", Any(), Const("c")), Const("c"))
    assert match(pattern, build.call("add", build.call("mul", x, 2), 2))
    assert not match(pattern, build.call("add", build.call("mul", x, 2), 3))
    assert not match(pattern, build.call("add", build.call("mul", x, 1), True))


def test_true_is_not_the_constant_one_and_one_is_the_constant_one_point_zero() -> None:
    build, x, _ = _two()
    assert not match(Call("mul", Any(), Const(equals=1)), build.call("mul", x, True))
    assert not match(Call("mul", Any(), Const(equals=True)), build.call("mul", x, 1))
    assert match(Call("mul", Any(), Const(equals=3.0)), build.call("mul", x, 3))


def test_a_constant_is_of_its_type() -> None:
    build, x, y = _two()
    pattern = Call("add", Any("x"), Const("eps", float))
    assert match(pattern, build.call("add", x, 1e-5))
    assert not match(pattern, build.call("add", x, 1))
    assert not match(pattern, build.call("add", x, y))


def test_opt_matches_bare_and_wrapped() -> None:
    build, x, _ = _two()
    negative = build.call("neg", x)
    pattern = Opt("to", Call("neg", Any("a")))
    assert match(pattern, negative)
    assert match(pattern, build.call("to", negative, torch.float64))
    assert not match(pattern, build.call("exp", negative))


def test_opt_looks_under_the_call_first() -> None:
    build, x, _ = _two()
    cast = build.call("to", x, torch.float64)
    found = match(Opt("to", Any("a")), cast)
    assert isinstance(found, Match)
    assert found["a"] is x
    both = Call("mul", Opt("to", Any("a")), Call("neg", Any("a")))
    found = match(both, build.call("mul", cast, build.call("neg", cast)))
    assert isinstance(found, Match)
    assert found["a"] is cast, "and bare where that alone fits"


def test_any_node_is_no_plain_value() -> None:
    build, x, _ = _two()
    assert match(Call("mul", Any(), Any()), build.call("mul", x, 2.0))
    assert not match(Call("mul", Any(), Any(node=True)), build.call("mul", x, 2.0))


def test_surplus_arguments_must_be_none_unless_more_is_said() -> None:
    build, x, _ = _two()
    w = build.weight("w", 4, 3)
    b = build.weight("b", 4)
    bare = Call("linear", Any(), Any())
    assert match(bare, build.call("linear", x, w, None))
    assert not match(bare, build.call("linear", x, w, b))
    assert match(Call("linear", Any(), Any(), more=True), build.call("linear", x, w, b))
    wide = build.call("softmax", x, -1, dtype=torch.float64)
    assert not match(Call("softmax", Any(), Any()), wide)


def test_a_value_given_by_name_must_be_there_and_be_that_value() -> None:
    build, x, _ = _two()
    pattern = Call("gelu", Any("a"), named={"approximate": "tanh"})
    assert match(pattern, build.call("gelu", x, approximate="tanh"))
    exact = build.call("gelu", x, approximate="none")
    for other in (exact, build.call("gelu", x)):
        found = match(pattern, other)
        assert not found
        assert isinstance(found, NoMatch)
        assert found.expected == "gelu with 1 arguments, approximate='tanh'"
    assert not match(Call("gelu", Any("a")), exact), "by name is surplus too"


def test_a_call_with_fewer_arguments_than_the_pattern_does_not_match() -> None:
    build, x, _ = _two()
    w = build.weight("w", 4, 3)
    assert not match(Call("linear", Any(), Any(), Any()), build.call("linear", x, w))


def test_the_exact_number_of_users_can_be_asked_for() -> None:
    build, x, y = _two()
    root = build.call("neg", x)
    build.call("add", root, y)
    assert match(Call("neg", Any(), users=1), root)
    build.call("sub", root, y)
    missed = match(Call("neg", Any(), users=1), root)
    assert isinstance(missed, NoMatch)
    assert "1 users" in missed.expected
    assert "2 users" in missed.found


def test_a_failed_match_is_falsy_and_names_node_expected_and_found() -> None:
    build, x, y = _two()
    root = build.call("mul", build.call("exp", x), y)
    missed = match(Call("mul", Call("neg", Any()), Any()), root)
    assert isinstance(missed, NoMatch)
    assert not missed
    assert (missed.node, missed.expected) == (root.name, "neg with 1 arguments")
    assert missed.found == "exp (exp)"
    assert str(missed) == f"at {root.name}: expected neg with 1 arguments, found exp (exp)"


def test_a_failed_match_tells_of_the_attempt_that_got_furthest() -> None:
    build, x, y = _two()
    deep = build.call("neg", build.call("exp", x))
    root = build.call("add", deep, y)
    pattern = Call(
        "add", Either(Call("sqrt", Any()), Call("neg", Call("tanh", Any()))), Any(), commutes=True
    )
    missed = match(pattern, root)
    assert isinstance(missed, NoMatch)
    assert (missed.node, missed.found) == (deep.name, "exp (exp)")
    assert missed.depth == 2


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda b: b.weight("model.norm.weight", 3), "the weight model.norm.weight"),
        (lambda b: b.input("ids", 3), "input ids"),
    ],
)
def test_a_failed_match_names_weights_and_inputs(make: object, found: str) -> None:
    build = Builder()
    node = make(build)  # type: ignore[operator]
    missed = match(Call("neg", Any()), node)
    assert isinstance(missed, NoMatch)
    assert missed.found == found


def test_a_search_ends_with_its_budget_and_says_so() -> None:
    build, x, _ = _two()
    root = x
    for _ in range(12):
        root = build.call("add", root, root)
    pattern: Any | Call = Any("x")
    for _ in range(12):
        pattern = Call("add", pattern, Any(), commutes=True)
    impossible = Call("add", pattern, Const(equals=5), commutes=True)
    missed = match(impossible, build.call("add", root, root), budget=500)
    assert isinstance(missed, NoMatch)
    assert "500 steps" in missed.expected
    assert match(pattern, root, budget=500), "and what fits is still found"


def test_a_pattern_is_frozen_data() -> None:
    pattern = Call("add", Any("a"), Either(Const("c"), Opt("to", Any("b"))), users=1)
    twin = Call("add", Any("a"), Either(Const("c"), Opt("to", Any("b"))), users=1)
    assert pattern == twin
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.users = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.args[1].options = ()  # type: ignore[attr-defined]


def test_matching_changes_nothing() -> None:
    build, x, y = _two()
    root = build.call("add", build.call("neg", x), y)
    before = str(build.graph)
    match(Call("add", Call("neg", Any()), Any(), commutes=True), root)
    assert str(build.graph) == before
