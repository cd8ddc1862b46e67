"""Imports run one way, and files stay short. What importing costs is in test_imports."""

from __future__ import annotations

import ast
import configparser
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 330
MAX_COLUMNS = 100

# A folder or module may import itself and what stands left of it.
ORDER = (
    "passes",
    "passes.policies",
    "errors",
    "config",
    "ours",
    "compat",
    "capture",
    "plan",
    "cache",
    "runtime",
    "generate",
    "engine",
    "distributed",
    "front",
)
LEAVES = {"errors", "config"}
# Tips stand beside that line: they may import it up to the named entry, and nobody imports them.
TIPS = {
    "testing": "passes.policies",
    "backend": "capture",
}
FOREIGN = {
    "passes": {"torch"},
    "passes.policies": {"torch"},
    "errors": set(),
    "config": set(),
}


@functools.cache
def sources() -> tuple[Path, ...]:
    """Every Python file that is installed."""
    found = (*(ROOT / "hybrid_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py"))
    return tuple(sorted(found))


def module_name(path: Path) -> str:
    """The dotted name under which ``path`` is installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, "hybrid_fx")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def stage(module: str) -> str | None:
    """The entry of ORDER that ``module`` belongs to; None for the top of the package."""
    below = module.removeprefix("hybrid_fx").lstrip(".")
    if below.startswith("passes.policies"):
        return "passes.policies"
    return below.split(".")[0] or None


@functools.cache
def installed() -> frozenset[str]:
    """The name of every module."""
    return frozenset(map(module_name, sources()))


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in ``path``, those inside functions too."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            deeper = [f"{target}.{alias.name}" for alias in node.names]
            found += [(node.lineno, full if full in installed() else target) for full in deeper]
    return found


def broken_arrow(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``; None where it may."""
    here, top = stage(importer), imported.split(".")[0]
    if top != "hybrid_fx":
        allowed = FOREIGN.get(here or "")
        if allowed is not None and top not in allowed and top not in sys.stdlib_module_names:
            return f"{here} may import the standard library and {sorted(allowed)}"
        return None
    there = stage(imported)
    if here is None or here == there:
        return None
    if there is None:
        return "the top of the package imports everything, and nothing imports it"
    if unknown := [name for name in (here, there) if name not in ORDER and name not in TIPS]:
        return f"{unknown[0]} has no place in ORDER or TIPS of this test"
    if there in TIPS:
        return f"{there} is a tip; nothing imports it"
    if there in LEAVES and not here.startswith("passes"):
        return None
    if ORDER.index(there) > ORDER.index(TIPS.get(here, here)):
        return f"{there} stands right of {here}"
    return None


def test_imports_point_left() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}: {why}"
        for path in sources()
        for line, imported in imports(path)
        if (why := broken_arrow(module_name(path), imported))
    ]
    assert not wrong, "\n".join(wrong)


def test_passes_name_themselves_only_relatively() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "passes").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and node.module)
        and node.module.split(".")[0] in ("hybrid_fx", "passes")
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("hybrid_fx.passes.rewrite", "hybrid_fx.plan.plan"),
        ("hybrid_fx.passes.rewrite", "transformers"),
        ("hybrid_fx.passes.rewrite", "hybrid_fx.errors"),
        ("hybrid_fx.passes.rewrite", "hybrid_fx.passes.policies.llama"),
        ("hybrid_fx.plan.plan", "hybrid_fx.engine.stats"),
        ("hybrid_fx.cache.disk", "hybrid_fx"),
        ("hybrid_fx.errors", "torch"),
        ("hybrid_fx.unheard_of.module", "hybrid_fx.plan"),
        ("hybrid_fx.engine.engine", "hybrid_fx.testing.strategies"),
        ("hybrid_fx.testing.strategies", "hybrid_fx.plan.plan"),
    ],
)
def test_a_wrong_arrow_is_seen(importer: str, imported: str) -> None:
    assert broken_arrow(importer, imported)


#: Upstreams that move, and the one folder that names them.
MOVING = {"transformers": "hybrid_fx/compat/transformers.py"}
#: Arguments and fields that one of them has renamed.
RENAMED = ("past_key_values", "cache_params", "cache_position")


def test_a_moving_upstream_is_named_in_one_file() -> None:
    wrong = []
    for path in sources():
        at = str(path.relative_to(ROOT))
        homes = {name: MOVING.get(name.split(".")[0], at) for _, name in imports(path)}
        wrong += [f"{at} imports {name}" for name, home in homes.items() if home != at]
        if at not in MOVING.values():
            wrong += [f"{at} names {name}" for name in RENAMED if name in path.read_text()]
    assert not wrong, "\n".join(wrong)


def test_files_stay_short_and_narrow() -> None:
    wrong = []
    for path in sources():
        at, lines = path.relative_to(ROOT), path.read_text().splitlines()
        if len(lines) > MAX_LINES:
            wrong.append(f"{at} has {len(lines)} lines; one idea a file")
        wide = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
        wrong += [f"{at}:{number} is wider than {MAX_COLUMNS}" for number in wide]
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {module_name(path) for path in sources() if path.name == "__init__.py"}
    assert listed == there
