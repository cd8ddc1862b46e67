"""A tensor of a call says where it is: torch may have another default device than the model."""

from __future__ import annotations

import ast

from test_layout import ROOT

FACTORIES = frozenset(
    (
        *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye"),
        *("rand", "randn", "randint", "randperm", "empty_strided"),
    )
)
FOLDERS = [ROOT / "hybrid_fx" / name for name in ("generate", "runtime", "distributed")]
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


def without_device(source: str) -> list[str]:
    """The calls of torch's factories that name no device."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def test_tensors_of_a_call_say_on_which_device_they_are() -> None:
    found = {str(path.relative_to(ROOT)): without_device(path.read_text()) for path in SOURCES}
    assert {at: calls for at, calls in found.items() if calls} == {}


def test_a_factory_without_a_device_is_seen() -> None:
    given = "torch.zeros(3); torch.ones(2, device=x); torch.empty(2, **o); torch.stack([])"
    assert without_device(given) == ["torch.zeros(3)"]
