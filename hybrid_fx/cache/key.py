"""The key of a plan: everything about a model that changes its graphs, and no weight."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..config import HybridConfig
from ..ours import is_ours
from ..passes import __file__ as passes_file
from .adapters import adapter_states, configs
from .fingerprint import Fingerprints, reference, sha256, text
from .helpers import class_functions, file_digest, functions_in, helper_modules
from .reach import atoms_of
from .roots import own_roots
from .tree import (
    NOT_CONFIG,
    global_hooks,
    is_code,
    is_config,
    is_part,
    own_attributes,
    own_hooks,
    walk,
)

# Options that change how a plan is run or kept; every other one is part of the key.
NOT_IN_GRAPH = frozenset(
    "max_out_tokens release_inference_cache verify_weights strict disk_cache cache_dir "
    "train_graph share_storage sampling capture_timeout pack_dtype".split()
)

_NOT_ADAPTER_CONFIG = frozenset(
    ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
)

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class StructureKey:
    """What a plan depends on. All values are text: equal keys have equal digests.

    Attributes:
        modules: (path, class) of every module; a shared one once for each path, with the first.
        classes: (path, digest) of every module's class and its bases as they stand in memory.
        helpers: (Python module, digest of its file, digest of the functions and constants that
            the model's classes, hooks and overrides, and the user's passes, use of it now).
        overrides: (path, name, digest) of what can be called in a module's own ``__dict__``:
            a patched ``forward`` or helper, an activation function.
        attributes: (path, JSON) of the other attributes of a module: numbers, strings, flags.
        config: (path, JSON) of each model config; with the attention implementation.
        hooks: (path, kind, digest) of forward hooks, torch's global ones first; for a training
            graph of backward hooks as well.
        own: Digest of what code of a user's in the forward may read.
        tensors: (name, kind, dtype, shape, device type), or (name, "tied", first name).
        parametrizations: (path, tensor, classes).
        adapters: (path, JSON) of adapter states and adapters' configs.
        training: Whether the key is for the training graph.
        modes: Paths of the modules in eval mode, for a training graph; the eval graph is captured
            with every module in eval mode.
        options: (name, JSON) of the :class:`HybridConfig` fields that change a graph.
        package: Digest of this package's source files.
        versions: (name, version) of Python, torch, transformers and peft.
    """

    modules: Rows
    classes: Rows
    helpers: Rows
    overrides: Rows
    attributes: Rows
    config: Rows
    hooks: Rows
    own: str
    tensors: Rows
    parametrizations: Rows
    adapters: Rows
    training: bool
    modes: tuple[str, ...]
    options: Rows
    package: str
    versions: Rows

    @classmethod
    def of(cls, model: nn.Module, config: HybridConfig, *, training: bool = False) -> StructureKey:
        """Read the key of ``model`` as it stands. No tensor's memory is read."""
        prints = Fingerprints()
        tree = [(path.removesuffix("."), module) for path, module in walk(model)]
        attributes, overrides, code = _attributes(tree, prints)
        hooks = [("", kind, hook) for kind, hook in global_hooks()]
        hooks += [(p, kind, h) for p, module in tree for kind, h in own_hooks(module)]
        hooks = [row for row in hooks if is_part(row[1], training) and not is_ours(row[2])]
        functions = [f for value in code for f in functions_in(value)]
        functions += [f for _, _, hook in hooks for f in functions_in(hook)]
        functions += [f for one in (*config.passes, *config.policies) for f in functions_in(one)]
        return cls(
            modules=_modules(model),
            classes=tuple((path, prints.whole_class(type(module))) for path, module in tree),
            helpers=helper_modules([*_class_functions(tree), *functions], prints),
            overrides=overrides,
            attributes=attributes,
            config=_configs(tree, prints),
            hooks=tuple((path, kind, _digest(prints, hook)) for path, kind, hook in hooks),
            own=_own(model, prints),
            tensors=_tensors(model),
            parametrizations=_parametrizations(tree),
            adapters=_adapters(model, prints),
            training=training,
            modes=tuple(path for path, m in tree if not m.training) if training else (),
            options=_options(config, prints),
            package=package_digest(),
            versions=versions(),
        )

    def digest(self) -> str:
        """sha256 (hex) of all fields, by name."""
        return sha256(*(part for name in self._names() for part in (name, self._text(name))))

    def differs(self, other: StructureKey) -> tuple[str, ...]:
        """Names of the fields in which the two keys differ."""
        return tuple(name for name in self._names() if self._text(name) != other._text(name))

    def _names(self) -> list[str]:
        return [field.name for field in fields(self)]

    def _text(self, name: str) -> str:
        return text(getattr(self, name))


def _digest(prints: Fingerprints, value: Any) -> str:
    return sha256(text(prints.value(value)))


def _modules(model: nn.Module) -> Rows:
    first: dict[int, str] = {}
    rows = []
    for path, module in model.named_modules(remove_duplicate=False):
        shared = first.setdefault(id(module), path)
        kind = reference(type(module))
        rows.append((path, kind) if shared == path else (path, kind, "is", shared))
    return tuple(rows)


def _class_functions(tree: list[tuple[str, nn.Module]]) -> list[FunctionType]:
    kinds = dict.fromkeys(base for _, module in tree for base in type(module).__mro__)
    return [function for kind in kinds for function in class_functions(kind)]


def _attributes(
    tree: list[tuple[str, nn.Module]], prints: Fingerprints
) -> tuple[Rows, Rows, list[Any]]:
    """(attributes, overrides, what can be called) of all modules."""
    plain, overrides, code = [], [], []
    for path, module in tree:
        told: dict[str, Any] = {}
        for name, value in own_attributes(module):
            if is_config(value) or name == "peft_config":
                continue  # has a field of its own
            if not is_code(value):
                told[name] = prints.value(value)
            elif not is_ours(value):
                code.append(value)
                overrides.append((path, name, _digest(prints, value)))
        if told:
            plain.append((path, text(told)))
    return tuple(plain), tuple(sorted(overrides)), code


def _configs(tree: list[tuple[str, nn.Module]], prints: Fingerprints) -> Rows:
    seen: set[int] = set()
    rows = []
    for path, module in tree:
        for name, value in own_attributes(module):
            if is_config(value) and id(value) not in seen:
                seen.add(id(value))
                rows.append((path, name, text(_config(value, prints))))
    return tuple(rows)


def _config(config: Any, prints: Fingerprints) -> Any:
    own = {name: value for name, value in vars(config).items() if name not in NOT_CONFIG}
    inner = {name: _config(value, prints) for name, value in own.items() if is_config(value)}
    # to_dict leaves private fields out: the implementations of attention and experts among them.
    private = {n: v for n, v in own.items() if n.startswith("_") and n not in inner}
    said = {k: v for k, v in config.to_dict().items() if k not in NOT_CONFIG and k not in inner}
    return [reference(type(config)), prints.value(said), prints.value(private), inner]


def _own(model: nn.Module, prints: Fingerprints) -> str:
    atoms = atoms_of(own_roots(model), [module for _, module in walk(model)])
    return sha256(
        *(prints.code(a) if isinstance(a, CodeType) else text(prints.value(a)) for a in atoms)
    )


def _tensors(model: nn.Module) -> Rows:
    first: dict[int, str] = {}
    rows: list[tuple[str, ...]] = []
    for path, module in walk(model):
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in held.items():
                rows.append(_tensor(path + name, kind, tensor, first))
    return tuple(rows)


def _tensor(name: str, kind: str, tensor: Tensor | None, first: dict[int, str]) -> tuple[str, ...]:
    if tensor is None:
        return (name, kind, "None")
    if (tied := first.setdefault(id(tensor), name)) != name:
        return (name, "tied", tied)
    described = (str(tensor.dtype), text(list(tensor.shape)), tensor.device.type)
    return (name, f"{kind} {reference(type(tensor))}", *described)


def _parametrizations(tree: list[tuple[str, nn.Module]]) -> Rows:
    rows = []
    for path, module in tree:
        if parametrize.is_parametrized(module):
            held: Any = module.parametrizations
            for name, steps in held.items():
                rows.append((path, name, *(reference(type(step)) for step in steps)))
    return tuple(rows)


def _adapters(model: nn.Module, prints: Fingerprints) -> Rows:
    rows: list[tuple[str, ...]] = []
    for path, state in adapter_states(model):
        said = {field.name: getattr(state, field.name) for field in fields(state)}
        rows.append((path, text(prints.value(said))))
    seen: set[int] = set()
    for path, module in walk(model):
        for name, config in configs(module).items():
            if id(config) not in seen and hasattr(config, "to_dict"):
                seen.add(id(config))
                kept = {k: v for k, v in config.to_dict().items() if k not in _NOT_ADAPTER_CONFIG}
                rows.append((f"{path}{name}", reference(type(config)), text(prints.value(kept))))
    return tuple(rows)


def _options(config: HybridConfig, prints: Fingerprints) -> Rows:
    names = [field.name for field in fields(config) if field.name not in NOT_IN_GRAPH]
    return tuple((name, text(prints.value(getattr(config, name)))) for name in names)


@functools.cache
def package_digest() -> str:
    """Digest of every source file of this package, read once in a process."""
    passes = Path(str(passes_file)).resolve().parent
    parts: list[str] = []
    for folder in (Path(__file__).resolve().parent.parent, passes):
        for file in sorted(folder.rglob("*.py")):
            # Installed, passes lie within the package; in a checkout they lie beside it.
            if folder == passes or passes not in file.parents:
                parts += [file.relative_to(folder).as_posix(), file_digest(str(file))]
    return sha256(*parts)


@functools.cache
def versions() -> Rows:
    """(name, version) of what graphs are made with; "" for what is not installed."""
    rows = [("python", f"{platform.python_implementation()} {platform.python_version()}")]
    rows.append(("torch", torch.__version__))
    for name in ("transformers", "peft"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, ""))
    return tuple(rows)
