"""Mistakes in what brings a graph into one spelling: canonicalize and what it is made of."""

from __future__ import annotations

from mutant import Fault, Group

GROUPS = (
    Group(
        "canonicalize",
        "passes/canonicalize.py",
        ("tests/passes/test_canonicalize.py",),
        (
            Fault(
                "every cast goes",
                "    if current == wanted and not moved and not copied:\n        return source",
                "    if not moved and not copied:\n        return source",
            ),
            Fault(
                "a product with a matrix reads it as the weight of a linear",
                "weight = matrix.args[0] if turned else call",
                "weight = matrix if turned else call",
                ("tests/passes/test_canonical_products.py",),
            ),
            Fault(
                "a product with many matrices is a linear",
                "or len(shape) != 2 or len(sizes) < 2 or node.kwargs:",
                "or len(sizes) < 2 or node.kwargs:",
                ("tests/passes/test_canonical_products.py",),
            ),
            Fault(
                "a vector times a matrix is a linear",
                "or len(shape) != 2 or len(sizes) < 2 or node.kwargs:",
                "or len(shape) != 2 or node.kwargs:",
                ("tests/passes/test_canonical_products.py",),
            ),
            Fault(
                "dropout that is on goes",
                "    return node.args[0] if training is False or rate == 0 else None",
                "    return node.args[0]",
            ),
            Fault(
                "a factor of two goes as well", "and factor == 1 and", "and factor in (1, 2) and"
            ),
            Fault(
                "a factor of one takes a change of dtype with it",
                "return value if dtype_of(value) == dtype_of(node) else None",
                "return value",
            ),
            Fault(
                "a slice of one axis of several goes",
                "return source if all(any(part == w for w in whole) for part in parts) else None",
                "return source if any(any(part == w for w in whole) for part in parts) else None",
            ),
            Fault(
                "an embedding loses max_norm",
                '    if not options or options.get("max_norm") is not None:',
                "    if not options:",
            ),
            Fault(
                "Conv1D's weight is not transposed",
                'turned = call(graph, "t", weight, path=path_of(inner))',
                "turned = weight",
            ),
            Fault(
                "Conv1D loses its bias",
                'return call(graph, "linear", source, turned, bias, path=path_of(inner))',
                'return call(graph, "linear", source, turned, None, path=path_of(inner))',
            ),
            Fault(
                "a product viewed with other rows is taken for a linear",
                "    if not same_rows or shape.dim() != 2",
                "    if shape.dim() != 2",
            ),
            Fault(
                "a view of memory that is written goes",
                "        if rule in _CHANGES_MEMORY and written & {node, *node.all_input_nodes}:",
                "        if rule in _CHANGES_MEMORY and not node.users:",
            ),
        ),
    ),
    Group(
        "canonicalize",
        "passes/spelling.py",
        ("tests/passes/test_canonicalize.py",),
        (
            Fault(
                "x.where(condition, other) swaps its operands",
                "node.args = (node.args[1], node.args[0], node.args[2])",
                "node.args = (node.args[1], node.args[2], node.args[0])",
            ),
            Fault(
                "half() casts to bfloat16",
                '"half": torch.float16',
                '"half": torch.bfloat16',
                (),
                "the rule for casts behind the spelling writes the dtype that capture recorded "
                "for the node, whatever dtype spelling put there; both stand in one pass",
            ),
            Fault(
                "sub with alpha becomes an addition",
                '"sub": "scaled_sub"',
                '"sub": "scaled_add"',
            ),
            Fault(
                "a number in front is not rounded",
                "isinstance(value_of(node.args[0]), _NUMBERS)",
                "False",
            ),
            Fault(
                "softmax loses its dtype",
                '{**kwargs, **({} if dtype is None else {"dtype": dtype})}',
                "{**kwargs}",
            ),
            Fault(
                "keywords are taken in the wrong place",
                '"transpose": ("input", "dim0", "dim1"),',
                '"transpose": ("input", "dim1", "dim1"),',
            ),
            Fault(
                "an activation's in-place flag is forgotten",
                'node.kwargs = {**kwargs, "inplace": True} if inplace else kwargs',
                "node.kwargs = kwargs",
                ("tests/passes/test_functionalize.py", "tests/passes/test_canonicalize.py"),
            ),
        ),
    ),
    Group(
        "functionalize",
        "passes/functionalize.py",
        ("tests/passes/test_functionalize.py",),
        (
            Fault(
                "a write is freed though another name sees it",
                "    if not isinstance(written, fx.Node) or _aliased(written, place, place[node]):",
                "    if not isinstance(written, fx.Node):",
            ),
            Fault(
                "a view taken before the write is overlooked",
                "    return _seen_later(node, place, at)\n",
                "    return False\n",
            ),
            Fault(
                "a write that keeps its dtype becomes a sum that widens it",
                "    return result.dtype == written.dtype and same_shape(",
                "    return same_shape(",
            ),
            Fault(
                "uses before the write get the new value",
                "delete_user_cb=lambda user: place[user] > place[node])",
                "delete_user_cb=lambda user: user is not node)",
            ),
            Fault(
                "x -= y becomes a sum",
                'operator.isub: ("sub", "sub_")',
                'operator.isub: ("add", "add_")',
            ),
            Fault(
                "x.add_(y, alpha=2) loses alpha",
                "        plain = _WITH_KEYWORDS.get(plain, plain)\n",
                "        node.kwargs = {}\n",
                ("tests/passes/test_canonicalize.py",),
            ),
        ),
    ),
    Group(
        "effects",
        "passes/effects.py",
        ("tests/passes/test_functionalize.py",),
        (
            Fault(
                "a transpose is no view", '    "view reshape transpose t ', '    "view reshape t '
            ),
            Fault("a slice is no view", "expand expand_as getitem split", "expand expand_as split"),
            Fault(
                "views of written memory are not counted as written",
                "todo += [user for user in node.users if node in shared_with(user)]",
                "todo += []",
                (
                    "tests/passes/test_functionalize.py",
                    "tests/passes/test_fuse_mlp.py",
                    "tests/passes/test_fusions.py",
                ),
            ),
            Fault(
                "only the weight that is written counts as written, not what shares its memory",
                "            todo += shared_with(source)\n",
                "            todo += []\n",
                ("tests/passes/test_hoist.py", "tests/passes/test_functionalize.py"),
            ),
            Fault(
                "a function of which nothing is known writes nothing",
                "    if is_opaque(node):\n        return node.all_input_nodes\n",
                "    if is_opaque(node):\n        return []\n",
                ("tests/passes/test_effects.py",),
            ),
            Fault(
                "a registered operator that writes is taken at its name",
                "        return bool(target._schema.is_mutable)",
                "        return False",
                ("tests/passes/test_effects.py",),
            ),
            Fault(
                "an assignment to a slice writes nothing",
                "iand ior ixor setitem",
                "iand ior ixor",
                ("tests/passes/test_effects.py",),
            ),
        ),
    ),
    Group(
        "graft",
        "passes/graft.py",
        ("tests/passes/test_graft.py",),
        (
            Fault(
                "a value that is written in place is replaced",
                "        if old in self._before.written:\n",
                "        if False:\n",
            ),
            Fault(
                "a replacement reads memory behind a write to it",
                "        if origin in self._before.written:\n",
                "        if False:\n",
            ),
            Fault(
                "a replacement spans two scopes",
                "            if self._scope[self._old[node]] != self._scope[root]:\n",
                "            if False:\n",
            ),
            Fault(
                "a value that others still read is replaced at its place",
                "            local = old in still_read or",
                "            local = False or",
            ),
            Fault(
                "random numbers that nothing reads are not drawn",
                'node.op in ("call_function", "call_method") and is_pure(node)',
                'node.op in ("call_function", "call_method")',
            ),
        ),
    ),
)
