"""Mistakes in packing: which weights, which memory, which product."""

from __future__ import annotations

from mutant import Fault, Group

_PACKING = ("tests/passes/test_pack_weights.py",)
_FORMS = ("tests/passes/test_packed_in_another_dtype.py",)
_HUGE = ("tests/runtime/test_huge_pages.py",)
_ROWS = ("tests/passes/test_row_buckets.py",)
_PREPARED = ("tests/runtime/test_prepared_tensors.py",)

GROUPS = (
    Group(
        "pack_weights",
        "passes/pack_weights.py",
        _PACKING,
        (
            Fault("a weight is packed once a reader", "if weight not in packed:", "if True:"),
            Fault(
                "the second weight of a fused MLP is forgotten",
                '"gated_mlp": (1, 3)',
                '"gated_mlp": (1,)',
            ),
            Fault("a weight that is written is packed", " or weight in written:", ":"),
            Fault("a second run packs again", 'return name_of(weight) != "pack" and ', "return "),
        ),
    ),
    Group(
        "packing",
        "passes/packing.py",
        _PACKING,
        (
            Fault("the bias is dropped", '(x, weight, bias, "none"', '(x, weight, None, "none"'),
            Fault(
                "any packed weight takes the memory of any other",
                "    if not fits:\n",
                "    if not rows:\n",
            ),
            Fault(
                "a weight behind another begins where a block does",
                "count % _BLOCK == 0",
                "True",
            ),
            Fault(
                "the first weight of a stack is packed alone",
                "                yield _stacked(group, dtype)\n",
                "                yield group[0].to(dtype)\n",
            ),
            Fault("a piece takes a whole weight", "room = size - count", "room = len(weight)"),
            Fault(
                "a packed weight is cut into rows",
                "fits = fits and all(weight",
                "assert all(weight",
            ),
            Fault("all pieces lie at the beginning", "        at += length\n", ""),
            Fault(
                "rows that lie otherwise alone are put where they do not belong",
                "return len(other) <= 2 and any(set(other) <= {rows, one} for one in filled)",
                "return True",
            ),
            Fault(
                "no rows are known to lie in pieces",
                "return len(other) <= 2 and any(set(other) <= {rows, one} for one in filled)",
                "return False",
            ),
            Fault(
                "a layout in which distances depend on the rows is filled in pieces",
                "len(other) <= 2 and ",
                "",
            ),
            Fault(
                "more is packed at once than is stated",
                "_refilled(kept, weights, _at_once(first))",
                "_refilled(kept, weights, rows)",
            ),
            Fault("a stack is tried again", "return len(weights) == 1 and", "return"),
            Fault(
                "the bias of a product in another dtype is not cast",
                "None if bias is None else bias.to(inside)",
                "bias",
                _FORMS,
            ),
            Fault("a result keeps the dtype of its kernel", "return out.to(dtype)", "return out"),
            Fault("more rows read the weight", "<= few.rows *", "<= 2 * few.rows *", _FORMS),
            Fault(
                "parts are put in another order",
                "return torch.cat(tuple(products), -1)",
                "return torch.cat(tuple(products)[::-1], -1)",
                _FORMS,
            ),
            Fault(
                "a piece is held beside the next one", "        del piece, new", "        #", _FORMS
            ),
            Fault(
                "a cast is tried in one piece",
                "kept.dtype == first.dtype and _refilled(kept, weights, rows)",
                "_refilled(kept, weights, rows)",
                _FORMS,
            ),
            Fault("double precision is packed in single", " or dtype not in _DTYPES", ""),
        ),
    ),
    Group(
        "prepared tensors",
        "hybrid_fx/runtime/prepared.py",
        _PREPARED,
        (
            Fault(
                "packed memory is returned and taken anew",
                "if kept is not None and refill(kept, *plain, dtype=form.dtype):",
                "if False:",
            ),
            Fault(
                "weights are joined as tensors that nobody knows",
                "self.store(index, self._stacked(weights, self._join))",
                "self.store(index, self._stacked(weights, concat_rows))",
                ("tests/engine/test_share_storage.py",),
            ),
            Fault("an opaque weight is refilled", "if wanted.packed and value.", "if value."),
            Fault(
                "what is no memory of the model's is lent",
                "self._is_lent(t) for t",
                "True for t",
                ("tests/runtime/test_packed_in_float32.py",),
            ),
            Fault(
                "the weights of before stay lent",
                "            lend(packed, few if ours else None)",
                "            lend(packed, lent(packed) or (few if ours else None))",
                ("tests/runtime/test_packed_in_float32.py",),
            ),
            Fault("a packed weight is lent", "if wanted.packed and value.", "if False and value."),
            Fault(
                "what a device does not pack is always copied",
                "self._stacked(weights, self._join)",
                "self._stacked(weights, concat_rows)",
            ),
        ),
    ),
    Group(
        "huge pages",
        "hybrid_fx/runtime/huge_pages.py",
        _HUGE,
        (
            Fault("a block begins anywhere", "count=nbytes, offset=begin", "count=nbytes"),
            Fault("small blocks take a page", "nbytes < PAGE or ", ""),
            Fault("pages stay small", "advise(memory, wanted", "advise(memory, mmap.MADV_NORMAL"),
        ),
    ),
    Group(
        "placing",
        "hybrid_fx/runtime/placing.py",
        _HUGE,
        (
            Fault("memory is freed while a weight is read", "placed._memory = memory", "pass"),
            Fault(
                "a placed weight is never freed",
                "alloc_tensors_by_stealing_from_void_ptrs([_capsule(made)])",
                "alloc_tensor_by_stealing_from_void_ptr(_capsule(made)),",
            ),
            Fault("the bytes are not moved", "packed_bytes(packed))\n    return", "0)\n    return"),
        ),
    ),
    Group(
        "packed in the manifest",
        "hybrid_fx/plan/build.py",
        _PACKING,
        (Fault("nothing is called packed", 'packed=name_of(node) == "pack"', "packed=False"),),
    ),
    Group(
        "copies in the manifest",
        "hybrid_fx/plan/build.py",
        ("tests/engine/test_copies.py",),
        (
            Fault("nothing is called folded", "folded=node in folded", "folded=False"),
            Fault("nothing is called a stack", "stacked=_stacked(node)", "stacked=()"),
        ),
    ),
    Group(
        "row_buckets",
        "passes/row_buckets.py",
        _ROWS,
        (
            Fault(
                "each number of rows has its kernel",
                "    step = 1 if",
                "    return rows\n    step = 1 if",
            ),
            Fault(
                "rows that fill up stay in the result",
                "(0, 0, 0, more)))[:rows]",
                "(0, 0, 0, more)))",
            ),
            Fault(
                "all pieces are the first",
                "_filled_up(product, flat[start : start + MOST])",
                "_filled_up(product, flat[: rows - start][:MOST])",
            ),
            Fault(
                "many rows run at once", "if rows <= MOST and rows ==", "if rows > MOST or rows =="
            ),
        ),
    ),
    Group(
        "packed results",
        "hybrid_fx/plan/prepare.py",
        ("tests/plan/test_prepare_source.py",),
        (
            Fault("a stack is joined before it is packed", "weight.args if stacked else", ""),
            Fault(
                "a stack that others read is not made",
                " and len(weight.users) == 1",
                "",
            ),
        ),
    ),
)
