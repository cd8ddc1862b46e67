"""A plan's key covers the user's passes and policies: what they are told, and the code they run."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("peft")

from changes import tiny_llama

from hybrid_fx.cache.key import StructureKey
from hybrid_fx.config import HybridConfig
from hybrid_fx.passes import Pass, Policy, Role
from hybrid_fx.passes.pattern import Any as Value
from hybrid_fx.passes.pattern import Call, Const, Opt
from hybrid_fx.passes.policies.llama import LLAMA

#: A user's module, as a notebook or a file has it.
SOURCE = """
from hybrid_fx.passes import Pass, PassResult, Rule, apply_rule
from hybrid_fx.passes.graph import call
from hybrid_fx.passes.pattern import Any, Call, Const, Opt

FACTOR = 2
DEEP = Opt("to", Call("mul", Opt("to", Call("add", Opt("to", Any("x")), Const(equals=1))), Any()))

def spell(found):
    return found["x"]

def build(graph, found):
    return call(graph, "mul", spell(found), FACTOR, path="")

RULES = (Rule(DEEP, build),)

def run(graph, context):
    return PassResult(sum(apply_rule(graph, rule) for rule in RULES))

MINE = Pass("mine", run)
"""


def user_pass(old: str = "", new: str = "") -> Pass:
    assert old in SOURCE
    module = types.ModuleType("users_notebook")
    exec(SOURCE.replace(old, new) if old else SOURCE, vars(module))
    made: Pass = module.MINE
    return made


@pytest.fixture(scope="module")
def key() -> Callable[..., StructureKey]:
    model = tiny_llama()
    return lambda **options: StructureKey.of(model, HybridConfig(**options))


def test_a_pass_changes_the_key_and_the_same_pass_does_not(key: Any) -> None:
    assert key(passes=(user_pass(),)).digest() != key().digest()
    assert key(passes=(user_pass(),)).differs(key(passes=(user_pass(),))) == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return PassResult(sum(", "return PassResult(1 + sum("),
        ('return found["x"]', 'return found["y"]'),
        ("FACTOR = 2", "FACTOR = 3"),
        ("equals=1", "equals=2"),
        ('"mul", spell(found), FACTOR', '"add", spell(found), FACTOR'),
        ("(Rule(DEEP, build),)", "(Rule(DEEP, build), Rule(DEEP, build))"),
        ('Pass("mine", run)', 'Pass("yours", run)'),
        ('Pass("mine", run)', 'Pass("mine", run, conflicts={"mlp_fused"})'),
        ('Pass("mine", run)', 'Pass("mine", run, may_add={"mul"})'),
        ('Pass("mine", run)', 'Pass("mine", run, exact=True)'),
    ],
)
def test_a_change_of_what_a_pass_is_or_runs_changes_the_key(key: Any, old: str, new: str) -> None:
    before, after = key(passes=(user_pass(),)), key(passes=(user_pass(old, new),))
    assert set(before.differs(after)) & {"options", "helpers"}
    assert before.digest() != after.digest()


def test_what_a_pass_closes_over_is_part_of_the_key(key: Any) -> None:
    def closing_over(value: int) -> Pass:
        return Pass("mine", lambda graph, context: value)  # type: ignore[arg-type,return-value]

    assert key(passes=(closing_over(1),)) == key(passes=(closing_over(1),))
    assert key(passes=(closing_over(1),)) != key(passes=(closing_over(2),))


def test_what_a_pass_is_bound_to_is_part_of_the_key(key: Any) -> None:
    def bound_to(value: int) -> Pass:
        return Pass("mine", functools.partial(user_pass().run, fusions=value))

    assert key(passes=(bound_to(1),)) == key(passes=(bound_to(1),))
    assert key(passes=(bound_to(1),)) != key(passes=(bound_to(2),))


def test_the_order_of_passes_is_part_of_the_key(key: Any) -> None:
    one, other = user_pass(), user_pass('Pass("mine"', 'Pass("other"')
    assert key(passes=(one, other)) != key(passes=(other, one))


def deep(equals: int) -> Policy:
    """A policy whose patterns nest deeper than any of the library's."""
    pattern: Any = Const("eps", equals=equals)
    for _ in range(12):
        pattern = Opt("to", Call("mul", Value("x"), pattern))
    return Policy(name="deep", roles=(Role(name="norm", pattern=pattern, at=("norm",)),))


def test_a_policy_is_known_by_its_data(key: Any) -> None:
    assert key(policies=(deep(1),)) == key(policies=(deep(1),))
    assert key(policies=(deep(1),)) != key(policies=(deep(2),)), "a constant at depth 24"
    mine = dataclasses.replace(LLAMA, name="mine")
    seen = {key().digest(), key(policies=(mine,)).digest()}
    for field, value in (("name", "other"), ("roles", mine.roles[:-1]), ("gains", {"fuse_mlp"})):
        seen.add(key(policies=(dataclasses.replace(mine, **{field: value}),)).digest())
    role = mine.roles[0]
    for field, value in (("name", "q2"), ("at", ("other",)), ("count", 3)):
        roles = (dataclasses.replace(role, **{field: value}), *mine.roles[1:])
        seen.add(key(policies=(dataclasses.replace(mine, roles=roles),)).digest())
    assert len(seen) == 8
