"""Mistakes in what passes stand on: source, patterns, rules, contracts, specification."""

from __future__ import annotations

from mutant import Fault, Group

_SPEC = ("tests/passes/test_spec.py",)

GROUPS = (
    Group(
        "emit",
        "passes/emit.py",
        ("tests/passes/test_emit.py",),
        (
            Fault(
                "a value is forgotten before its last use",
                "lambda n: remaining[n] > 0 or n in results,",
                "lambda n: remaining[n] > 1 or n in results,",
            ),
            Fault(
                "calls that must keep their order move out of a layer",
                "sound = not _order_matters(graph, region, written)",
                "sound = True",
            ),
            Fault(
                "layers that differ share one function",
                "        if key not in kinds:\n",
                "        if not kinds:\n",
            ),
            Fault(
                "the memory of keys is handed over for that of values",
                '    "keys": "key_memory",\n    "values": "value_memory",\n',
                '    "values": "key_memory",\n    "keys": "value_memory",\n',
                ("tests/golden/test_golden.py",),
            ),
        ),
    ),
    Group(
        "patterns",
        "passes/pattern.py",
        ("tests/passes/test_pattern.py",),
        (
            Fault(
                "operands match in any order",
                "permutations(range(count)) if pattern.commutes else [tuple(range(count))]",
                "permutations(range(count))",
            ),
            Fault(
                "one name may stand for two values",
                "return bound if bound[name] is value or _equal(bound[name], value) else None",
                "return bound",
            ),
            Fault(
                "arguments beyond the pattern are overlooked",
                "pattern.more or all(extra is None for extra in surplus)",
                "True",
            ),
            Fault(
                "what is given by name may be another value",
                "_equal(value.kwargs.get(key, ...), given)",
                "key in value.kwargs",
            ),
            Fault(
                "other users are overlooked",
                "right = len(value.users) == pattern.users",
                "right = True",
            ),
            Fault(
                "True is taken for 1",
                "not isinstance(a, fx.Node) and type(a) is type(b) and bool(a == b)",
                "not isinstance(a, fx.Node) and bool(a == b)",
            ),
        ),
    ),
    Group(
        "rules",
        "passes/rewrite.py",
        (
            "tests/passes/test_rewrite.py",
            "tests/passes/test_fuse_mlp.py",
            "tests/passes/test_fusions.py",
        ),
        (
            Fault(
                "what others use counts as safe to replace",
                "free = {found.root, *outputs}",
                "free = {*found.nodes, *outputs}",
            ),
            Fault(
                "memory that is written is rewritten all the same",
                "if not found or reads_written(found, written):",
                "if not found:",
            ),
            Fault(
                "a rule reaches beyond its module",
                "or not inside(node, within) or",
                "or",
            ),
        ),
    ),
    Group(
        "contracts",
        "passes/contract.py",
        ("tests/passes/test_contract.py",),
        (
            Fault(
                "a conflict is overlooked",
                "                if fact in one.conflicts:\n",
                "                if not fact:\n",
            ),
            Fault(
                "what a pass needs is not asked for",
                "for fact in sorted(one.requires - holds.keys()):",
                "for fact in sorted(one.requires - one.requires):",
            ),
            Fault(
                "operators that become more are not asked for",
                "return tuple(sorted(added.keys() - allowed))",
                "return ()",
                ("tests/passes/test_contract.py", "tests/passes/test_rewrite.py"),
            ),
        ),
    ),
    Group(
        "specification",
        "passes/spec.py",
        _SPEC,
        (
            Fault(
                "a write into a view of a parameter is legal",
                "        for base in bases(node.args[0]):\n",
                "        for base in [node.args[0]]:\n",
            ),
            Fault(
                "attention without the workspace is legal",
                'if name_of(node) == "attention":',
                'if name_of(node) == "":',
            ),
            Fault(
                "what the table lacks is legal",
                "operator_name(node.target) is None:",
                "node.target is None:",
            ),
        ),
    ),
    Group(
        "policies",
        "passes/roles.py",
        ("tests/passes/test_policies.py",),
        (
            Fault(
                "one norm of two is enough",
                "    if len(found) >= role.count:",
                "    if len(found) >= 1:",
            ),
            Fault(
                "a role may stand anywhere in its layer",
                "if not any(inside(node, place) for place in places):",
                "if not places:",
            ),
        ),
    ),
    Group(
        "driver",
        "passes/driver.py",
        ("tests/passes/test_driver.py", "tests/passes/test_contract.py"),
        (
            Fault(
                "a graph stays as the pass that failed left it",
                "            snapshot.restore()\n",
                "            pass\n",
            ),
            Fault(
                "the specification is not looked at behind a pass",
                "    check_graph(graph, stage=one.name, rules=rules)\n",
                "    check_graph(graph, stage=one.name, rules=())\n",
            ),
        ),
    ),
    Group(
        "driver",
        "passes/bounds.py",
        ("tests/passes/test_driver.py",),
        (
            Fault(
                "the bound stays on the graph",
                '        del vars(graph)["create_node"]\n',
                "        pass\n",
            ),
        ),
    ),
    Group(
        "driver",
        "passes/snapshot.py",
        ("tests/passes/test_driver.py",),
        (
            Fault(
                "a node that was erased loses its meta",
                '        "meta": copy.copy(node.meta),',
                '        "meta": {},',
            ),
            Fault(
                "nodes come back in another order",
                "                last.append(node)\n",
                "                pass\n",
            ),
        ),
    ),
)
