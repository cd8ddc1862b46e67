"""The adapter state of a model, read from its modules by what they carry; peft is not imported.

Covered are PEFT's tuner layers (LoRA, IA3, LoHa ...), its wrappers for fully trained modules,
the modules at the root that keep the adapters' configs, and linear layers that hold LoRA factors
themselves, as those of DeepSpeed-Chat do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

Scalar = bool | int | float | str | None
_SCALARS = (bool, int, float, str, type(None))

#: The factors that a linear layer of DeepSpeed-Chat holds itself; its scalars are called lora too.
_OWN_FACTORS = frozenset({"lora_right_weight", "lora_left_weight"})


@dataclass(frozen=True, slots=True)
class AdapterState:
    """What decides which low-rank products a module adds, apart from their tensors.

    Attributes:
        kind: Class of the module.
        active: Names of the active adapters, in order.
        disabled: Whether the module ignores its adapters.
        merged: Names of the adapters added into the base weight, in order.
        names: Names of all adapters present, sorted.
        numbers: (attribute, adapter, value) of every scalar kept for each adapter: scaling, r,
            lora_alpha, use_rslora ... sorted.
    """

    kind: str
    active: tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]
    names: tuple[str, ...]
    numbers: tuple[tuple[str, str, Scalar], ...]

    def differs(self, other: AdapterState) -> str:
        """Say the first field that differs, e.g. ``"active ('a',) -> ('b',)"``; "" if none."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if repr(mine) != repr(theirs):
                return f"{field.name} {mine} -> {theirs}"
        return ""


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(str(name) for name in value)
    return ()


def _active(module: nn.Module) -> tuple[str, ...]:
    # PeftModel and the tuners keep `active_adapter`; their layers keep `_active_adapter`. Where
    # the former is a method (transformers' own PEFT mixin) the layers say what is active.
    private = getattr(module, "_active_adapter", None)
    return _names(private if private is not None else getattr(module, "active_adapter", None))


def configs(module: nn.Module) -> Mapping[str, Any]:
    """The adapters' configs that ``module`` keeps, by adapter name; empty for most modules."""
    if "peft_config" not in module.__dict__ and not hasattr(type(module), "peft_config"):
        return {}
    found = getattr(module, "peft_config", None)
    return found if isinstance(found, Mapping) else {}


def adapter_state(module: nn.Module) -> AdapterState | None:
    """Return the adapter state of ``module`` itself, or None where it has to do with none."""
    kind = type(module)
    is_layer = hasattr(kind, "adapter_layer_names")
    kept = configs(module)
    has_factors = module._parameters.keys() >= _OWN_FACTORS
    if not is_layer and not kept and not has_factors:
        return None
    present = set(kept)
    numbers: list[tuple[str, str, Scalar]] = []
    if has_factors:
        numbers += [
            (name, "", value)
            for name, value in vars(module).items()
            if "lora" in name and isinstance(value, _SCALARS)
        ]
    if is_layer:
        listed: Any = module
        children = module._modules
        for attribute in dict.fromkeys((*listed.adapter_layer_names, *listed.other_param_names)):
            holder: Any = children.get(attribute) or getattr(module, attribute, None)
            if not hasattr(holder, "keys"):
                if isinstance(holder, _SCALARS) and holder is not None:
                    numbers.append((attribute, "", holder))
                continue
            present.update(str(name) for name in holder.keys())  # noqa: SIM118
            if isinstance(holder, dict):
                numbers += [
                    (attribute, str(name), value)
                    for name, value in holder.items()
                    if isinstance(value, _SCALARS)
                ]
        present.update(_names(getattr(module, "_adapters", None)))
    disabled = getattr(module, "_disable_adapters", False)
    return AdapterState(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        active=_active(module),
        disabled=bool(disabled or getattr(module, "_adapters_disabled", False)),
        merged=_names(getattr(module, "merged_adapters", ())),
        names=tuple(sorted(present)),
        numbers=tuple(sorted(numbers, key=lambda number: number[:2])),
    )


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are active somewhere in ``model``, in order.

    Read from the modules: the base model of a PeftModel holds adapters, and cannot say which.
    """
    names = (name for _, state in adapter_states(model) for name in state.active)
    return tuple(dict.fromkeys(names))


def adapter_states(model: nn.Module) -> Iterator[tuple[str, AdapterState]]:
    """(qualified path, state) of every module of ``model`` that has to do with adapters."""
    for path, module in model.named_modules():
        if (state := adapter_state(module)) is not None:
            yield path, state
