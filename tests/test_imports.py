"""What importing costs, in modules and never in seconds, and each module imported alone.

Every claim runs in an interpreter of its own: pytest itself has loaded half of what must not be.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from test_layout import ROOT, module_name, sources, stage

import hybrid_fx

#: What takes long to load, or is not there at all after a plain install.
HEAVY = ("deepspeed", "hypothesis", "matplotlib", "peft", "transformers", "trl")

#: Folder, or public name of the package -> what of HEAVY it may load; by default nothing.
MAY_LOAD: dict[str, set[str]] = {
    "compat": {"transformers"},
    "capture": {"transformers"},
    "runtime": {"transformers"},
    "generate": {"transformers"},
    "engine": {"transformers"},
    "distributed": {"deepspeed", "transformers"},
    "front": {"transformers"},
    "testing": {"hypothesis"},
    "HybridEngine": {"transformers"},
    "hybridize": {"transformers"},
    "initialize": set(),
}
#: Public names that are served without torch.
WITHOUT_TORCH = sorted({*hybrid_fx.__all__} - {"HybridEngine", "hybridize", "initialize"})

#: Modules of its own that `import hybrid_fx` may load: what holds the config and the errors.
OWN = 8


def by_stage() -> dict[str, list[str]]:
    """The modules of each folder; the top of the package is ""."""
    found: dict[str, list[str]] = {}
    for path in sources():
        found.setdefault(stage(module_name(path)) or "", []).append(module_name(path))
    return found


def loaded(statement: str) -> set[str]:
    """Every module a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def tops(modules: set[str]) -> set[str]:
    """The packages these modules belong to."""
    return {module.partition(".")[0] for module in modules}


def foreign(modules: set[str]) -> set[str]:
    """Packages that are neither of the standard library nor this one."""
    known = {*sys.stdlib_module_names, "hybrid_fx"}
    return {top for top in tops(modules) if top not in known and not top.startswith("_")}


def test_importing_the_package_loads_its_config_and_errors_and_nothing_foreign() -> None:
    bare, now = loaded("pass"), loaded("import hybrid_fx")
    assert foreign(now - bare) == set()
    own = {name for name in now if name.partition(".")[0] == "hybrid_fx"}
    assert len(own) <= OWN, sorted(own)


@pytest.mark.parametrize("name", hybrid_fx.__all__)
def test_a_public_name_loads_only_what_it_needs(name: str) -> None:
    now = loaded(f"from hybrid_fx import {name}")
    assert tops(now) & {*HEAVY} <= MAY_LOAD.get(name, set())
    if name in WITHOUT_TORCH:
        assert "torch" not in now


# By forks of one interpreter that holds torch: each would take seconds to load it again.
_BY_FOLDER = """
import contextlib, importlib, io, json, os, sys
folders, heavy = {folders!r}, {heavy!r}
import torch, torch._dynamo
for folder, modules in folders.items():
    if os.fork() == 0:
        code = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed logs there
                for module in modules:
                    importlib.import_module(module)
            tops = {{name.partition(".")[0] for name in sys.modules}}
            print(json.dumps([folder, sorted(tops & set(heavy))]), flush=True)
            code = 0
        finally:
            os._exit(code)
    if os.wait()[1]:
        print(json.dumps([folder, ["it does not load"]]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_all_modules_of_a_folder_load_only_what_the_folder_needs() -> None:
    folders = {
        folder: modules
        for folder, modules in by_stage().items()
        if folder and all(map(importlib.util.find_spec, MAY_LOAD.get(folder, set())))
    }
    code = _BY_FOLDER.format(folders=folders, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded_by = dict(map(json.loads, done.stdout.splitlines()))
    assert set(loaded_by) == set(folders), done.stderr
    too_much = {f: {*names} - MAY_LOAD.get(f, set()) for f, names in loaded_by.items()}
    assert {folder: names for folder, names in too_much.items() if names} == {}, done.stderr


@pytest.mark.parametrize("folder", ["passes", "passes.policies"])
def test_the_rewriting_library_loads_nothing_foreign_that_torch_does_not(folder: str) -> None:
    after = loaded("import torch, torch.fx, torch._subclasses.fake_tensor")
    now = loaded(f"import {', '.join(by_stage()[folder])}")
    assert foreign(now) <= foreign(after)


# Imported by fork of one interpreter that holds the foreign packages: a fresh one for each module
# would take minutes. A child prints what went wrong; what is missing but optional is no fault.
_ALONE = """
import contextlib, importlib, io, os, sys, traceback
heavy, modules = {heavy!r}, {modules!r}
import torch, torch._dynamo, transformers.generation.utils
import transformers.masking_utils, transformers.modeling_utils
assert not any(name.split(".")[0] == "hybrid_fx" for name in sys.modules)
for module in modules:
    if os.fork() == 0:
        code = 0
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed logs there
                importlib.import_module(module)
        except BaseException as error:
            if getattr(error, "name", None) not in heavy or not isinstance(error, ImportError):
                print(module, traceback.format_exc(), flush=True)
                code = 1
        os._exit(code)
    if os.wait()[1] not in (0, 256):
        print(module, "ended by a signal")
"""


@pytest.mark.deep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_module_imports_alone_in_a_fresh_process() -> None:
    modules = [module_name(path) for path in sources()]
    code = _ALONE.format(heavy=HEAVY, modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
