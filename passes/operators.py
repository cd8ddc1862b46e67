"""The operator table: every function a graph may call, by its canonical name.

A legal graph calls nothing else, and neither does generated source: it is what makes a stored
plan safe to execute. Names follow torch; what passes add comes from :mod:`.kernels`,
:mod:`.folding` and :mod:`.attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from . import attention, collectives, folding, kernels, packing

# Python operators serve tensors and symbolic sizes alike.
_PYTHON = (
    "add sub mul truediv floordiv mod pow neg pos matmul getitem eq ne lt le gt ge "
    "and_ or_ xor invert"
)
_FUNCTIONAL = (
    "linear embedding layer_norm group_norm silu relu gelu softplus mish hardswish leaky_relu elu "
    "softmax log_softmax dropout pad one_hot normalize relu6 hardtanh hardsigmoid logsigmoid "
    "scaled_dot_product_attention rms_norm glu"
)
_TORCH = (
    "abs addmm all any amax amin arange argmax baddbmm bmm cat chunk clamp clone conv1d cos cumsum "
    "diff div einsum empty_like erf exp exp2 expm1 eye flatten flip full full_like gather histc "
    "index_select isfinite isinf isnan log log1p log2 logical_and logical_not logical_or "
    "logsumexp masked_fill max maximum mean min minimum mm movedim mul norm ones ones_like outer "
    "permute prod reciprocal repeat_interleave reshape roll round rsqrt scatter sigmoid sign sin "
    "sort split sqrt square squeeze stack std sum swapaxes t tan tanh tensor tile topk transpose "
    "tril triu unbind unflatten unsqueeze var where zeros zeros_like rsub sym_max sym_min"
)
_METHODS = (
    "contiguous expand expand_as new_empty new_full new_ones new_tensor new_zeros repeat size to "
    "type_as view view_as unfold narrow select index_add index_copy index_put detach item numel dim"
)
# What writes into its first argument. Legal only where nothing else sees that memory.
_IN_PLACE = (
    "add_ sub_ mul_ div_ copy_ fill_ zero_ masked_fill_ clamp_ neg_ pow_ sqrt_ rsqrt_ exp_ "
    "sigmoid_ tanh_ relu_ index_copy_ index_add_ index_put_ scatter_"
)


def _build() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for owner, names in (
        (torch.Tensor, _METHODS + " " + _IN_PLACE),
        (torch, _TORCH),
        (F, _FUNCTIONAL),
        (operator, _PYTHON),
    ):
        table |= {name: getattr(owner, name) for name in names.split() if hasattr(owner, name)}
    table["gather_along"] = table.pop("gather")
    table["torch_rms_norm"] = table.pop("rms_norm")  # rounds elsewhere than the Llama family
    # torch's own, where Python's operator lacks the keyword, add(x, y, alpha=2), or rounds a number
    # elsewhere: 0.1 * x multiplies by 0.1, torch.mul(0.1, x) by 0.1 in the dtype of x
    table["scaled_add"], table["scaled_sub"] = torch.add, torch.sub
    table["torch_mul"] = torch.mul
    # Not F.linear as it stands: DeepSpeed replaces that name for the whole process.
    table["linear"] = torch._C._nn.linear
    table["vector_norm"] = torch.linalg.vector_norm
    table["linalg_norm"] = torch.linalg.norm
    table["attention"] = attention.attention
    for module, names in (
        (collectives, "all_reduce all_gather"),
        (attention, "attend attend_one attend_as_configured"),
        (packing, "pack packed_linear"),
        (folding, "fold_lora fold_dora measured_lora measured_dora"),
        (
            kernels,
            "rms_norm add_rms_norm add_layer_norm gated_mlp split_gated_mlp plain_mlp grouped_mm "
            "gather issue_gather wait_gather concat_rows given last_tokens select_tokens "
            "track_gradient store store_packed",
        ),
    ):
        table |= {name: getattr(module, name) for name in names.split()}
    return table


#: Canonical name -> the function.
OPERATORS: Mapping[str, Callable[..., Any]] = MappingProxyType(_build())

#: The function -> its canonical name.
NAMES: Mapping[Any, str] = MappingProxyType({fn: name for name, fn in OPERATORS.items()})

#: Operators that write into their first argument.
IN_PLACE: frozenset[str] = frozenset(_IN_PLACE.split())

#: Where an activation's ``inplace`` stands; it is a keyword in a canonical graph, and only if true.
INPLACE_AT: Mapping[str, int] = MappingProxyType(
    dict.fromkeys("relu silu mish hardswish relu6 hardsigmoid".split(), 1)
    | {"elu": 2, "leaky_relu": 2, "hardtanh": 3, "dropout": 3}
)

#: Operators with an effect besides their result: never moved, merged or dropped.
EFFECTS: frozenset[str] = IN_PLACE | {
    "attend",
    "attend_one",
    "attend_as_configured",
    "track_gradient",
    "store",
    "store_packed",
    "all_reduce",
    "all_gather",
    "issue_gather",
    "wait_gather",
}


def operator_name(target: object) -> str | None:
    """The canonical name of a call target, or ``None`` where the table lacks it."""
    try:
        return NAMES.get(target)
    except TypeError:
        return None
