"""Law 7: the key covers all that changes a graph, and nothing that does not."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from changes import FIELDS, MORE, Steering, adapted_llama, layer, scaled_forward, tiny_llama

from hybrid_fx.cache import key as key_module
from hybrid_fx.cache.helpers import file_digest
from hybrid_fx.cache.key import NOT_IN_GRAPH, StructureKey
from hybrid_fx.capture.capture import capture
from hybrid_fx.config import HybridConfig

CONFIG = HybridConfig()


def key_of(model: nn.Module, *, training: bool = False) -> StructureKey:
    return StructureKey.of(model, CONFIG, training=training)


def check_changed(before: StructureKey, after: StructureKey, field: str) -> None:
    assert field in before.differs(after)
    assert before.digest() != after.digest()
    assert before != after


# Each field -----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_change_of_each_field_changes_the_digest(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_llama()
    training = field == "modes"
    before = key_of(model, training=training)
    FIELDS[field](model, monkeypatch)
    check_changed(before, key_of(model, training=training), field)


@pytest.mark.parametrize("name", MORE)
def test_a_change_is_not_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, change = MORE[name]
    model = adapted_llama()
    before = key_of(model)
    change(model, monkeypatch)
    check_changed(before, key_of(model), field)


def test_the_training_flag_changes_the_digest() -> None:
    model = tiny_llama()
    check_changed(key_of(model), key_of(model, training=True), "training")


@pytest.mark.parametrize(
    "options", [{"graph": "inductor"}, {"lora": "side"}, {"disable_passes": ("concat_qkv",)}]
)
def test_options_of_the_graph_change_the_digest(options: dict[str, Any]) -> None:
    model = tiny_llama()
    after = StructureKey.of(model, HybridConfig(**options))
    assert key_of(model).differs(after) == ("options",)
    check_changed(key_of(model), after, "options")


def test_package_and_versions_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = key_of(model)
    monkeypatch.setattr(key_module, "package_digest", lambda: "another")
    check_changed(before, key_of(model), "package")
    monkeypatch.undo()
    monkeypatch.setattr(key_module, "versions", lambda: (("torch", "0.0"),))
    check_changed(before, key_of(model), "versions")


def test_every_field_has_a_changer() -> None:
    tested = {*FIELDS, "training", "options", "package", "versions"}
    assert {field.name for field in dataclasses.fields(StructureKey)} == tested


def test_the_digest_reads_every_field() -> None:
    key = key_of(tiny_llama())
    for field in dataclasses.fields(key):
        value = getattr(key, field.name)
        other = not value if isinstance(value, bool) else type(value)()
        if other == value:
            other = (("something",),)
        changed = dataclasses.replace(key, **{field.name: other})
        assert key.differs(changed) == (field.name,)
        assert key.digest() != changed.digest()


def test_options_outside_the_graph_are_named_and_change_nothing() -> None:
    names = {field.name for field in dataclasses.fields(HybridConfig)}
    assert names >= NOT_IN_GRAPH
    assert names - NOT_IN_GRAPH == {
        *("graph", "lora", "fusions", "disable_passes", "passes", "policies")
    }
    model = tiny_llama()
    kept = {"cache_dir": "/nowhere", "disk_cache": False, "capture_timeout": None}
    other = HybridConfig(max_out_tokens=9, strict=True, **kept)
    assert StructureKey.of(model, other) == key_of(model)


# The same structure ---------------------------------------------------------------------------


def test_a_model_built_twice_has_one_digest() -> None:
    one, two = adapted_llama(seed=1), adapted_llama(seed=2)
    assert not torch.equal(one.get_input_embeddings().weight, two.get_input_embeddings().weight)
    assert key_of(one).differs(key_of(two)) == ()
    assert key_of(one).digest() == key_of(two).digest()
    assert key_of(copy.deepcopy(one)).digest() == key_of(one).digest()


def test_a_second_process_gets_the_same_digest() -> None:
    code = (
        "import dataclasses\n"
        "from changes import adapted_llama, layer, Steering\n"
        "from hybrid_fx.cache.key import StructureKey\n"
        "from hybrid_fx.config import HybridConfig\n"
        "model = adapted_llama()\n"
        "layer(model).register_forward_hook(Steering(2.0))\n"
        "key = StructureKey.of(model, HybridConfig())\n"
        "print(dataclasses.replace(key, package='').digest())\n"
    )
    model = adapted_llama()
    layer(model).register_forward_hook(Steering(2.0))
    folder = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The package's own sources are left out: someone may edit one while the tests run.
    assert done.stdout.split()[-1] == dataclasses.replace(key_of(model), package="").digest()


def forget_what_classes_remember(model: nn.Module) -> None:
    # Earlier tests of this process may have made transformers cache its answers already.
    for name in [name for name in vars(type(model)) if name.endswith("_cached_value")]:
        delattr(type(model), name)


def other_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)


def our_own_override(model: nn.Module) -> None:
    def generate(*args: Any) -> None: ...

    generate.__module__ = "hybrid_fx.engine.engine"
    model.generate = generate  # type: ignore[assignment]
    of_ours = type("Switch", (), {"__module__": "hybrid_fx.engine.switch", "__call__": generate})
    model.prepare_inputs_for_generation = of_ours()


def run_it(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model(input_ids=ids, labels=ids).loss.backward()


def compile_it(model: Any) -> None:
    torch.compile(model, backend="eager")(input_ids=torch.ones(2, 3, dtype=torch.long))
    torch._dynamo.reset()


def other_attention_and_back(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")


def save_it(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)


SAME: dict[str, Callable[[Any], object]] = {
    "weights": other_weights,
    "train mode": lambda model: model.train(),
    "requires_grad": lambda model: model.requires_grad_(False),
    "an override of ours": our_own_override,
    "where it came from": lambda model: setattr(model.config, "_name_or_path", "/some/where"),
    "use_cache": lambda model: setattr(model.config, "use_cache", False),
    "generation config": lambda model: setattr(model.generation_config, "top_k", 7),
    "gradients": lambda model: [setattr(p, "grad", torch.ones_like(p)) for p in model.parameters()],
    "a generate and a training forward": run_it,
    "save_pretrained": save_it,
    "a compilation": compile_it,
    "a capture": lambda model: capture(model),
    "attention switched and switched back": other_attention_and_back,
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_graph_keeps_the_digest(name: str) -> None:
    model = tiny_llama()
    forget_what_classes_remember(model)
    before = key_of(model)
    SAME[name](model)
    assert before.differs(key_of(model)) == ()
    assert before.digest() == key_of(model).digest()


@pytest.mark.parametrize("name", FIELDS)
def test_undone_changes_give_the_old_digest(name: str) -> None:
    model = adapted_llama()
    before = key_of(model)
    with pytest.MonkeyPatch.context() as patch:
        FIELDS[name](copy.deepcopy(model), patch)
    assert key_of(model) == before


# Code, closely ----------------------------------------------------------------------------------


def with_forward(function: Callable[..., Any]) -> StructureKey:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = function.__get__(model[0])
    return key_of(model)


def test_a_constant_in_a_closure_is_seen() -> None:
    one, two = with_forward(scaled_forward(1.0)), with_forward(scaled_forward(2.0))
    assert one.differs(two) == ("overrides", "own")
    assert with_forward(scaled_forward(2.0)).digest() == two.digest()


def test_a_function_without_source_is_seen() -> None:
    def made(source: str) -> Callable[..., Any]:
        space: dict[str, Any] = {"__name__": "typed_in"}
        exec(source, space)
        return space["forward"]

    one = with_forward(made("def forward(self, x):\n    return x + 1"))
    two = with_forward(made("def forward(self, x):\n    return x + 2"))
    same = with_forward(made("\n\n\ndef forward(self, x):\n\n    return x + 1"))
    assert "overrides" in one.differs(two)
    assert one.digest() == same.digest()


def test_a_global_constant_that_a_patched_forward_reads_is_seen() -> None:
    def made(constant: str) -> StructureKey:
        space: dict[str, Any] = {"__name__": "typed_in"}
        exec(f"FACTOR = {constant}\nUNUSED = {constant}\nHELPER = len", space)
        exec("def forward(self, x):\n    return x * FACTOR", space)
        return with_forward(space["forward"])

    assert made("2.0").differs(made("3.0")) == ("helpers", "own")
    assert made("2.0") == made("2.0")


def test_a_global_that_nothing_reads_is_not_seen() -> None:
    def made(step: int) -> StructureKey:
        space: dict[str, Any] = {"__name__": "typed_in", "step": step}
        exec("def forward(self, x):\n    return x", space)
        return with_forward(space["forward"])

    assert made(1) == made(2)


def test_two_classes_of_one_name_are_told_apart() -> None:
    def made(factor: float) -> nn.Module:
        class Local(nn.Module):
            scale = factor

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * self.scale

        return nn.Sequential(Local())

    assert key_of(made(1.0)).differs(key_of(made(2.0))) == ("classes", "own")
    assert key_of(made(2.0)) == key_of(made(2.0))


def test_the_number_in_a_hook_object_is_seen() -> None:
    def hooked(strength: float) -> StructureKey:
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_forward_hook(Steering(strength))
        return key_of(model)

    assert hooked(1.0).differs(hooked(2.0)) == ("hooks", "own")
    assert hooked(2.0) == hooked(2.0)


def test_a_recursive_closure_ends() -> None:
    def made() -> Callable[..., Any]:
        def forward(self: nn.Module, x: torch.Tensor) -> Any:
            return forward(self, x)

        return forward

    assert with_forward(made()) == with_forward(made())


def test_a_hook_on_every_module_of_the_process_is_seen() -> None:
    model = tiny_llama()
    before = key_of(model)
    handle = nn.modules.module.register_module_forward_hook(Steering(2.0))
    try:
        check_changed(before, key_of(model), "hooks")
    finally:
        handle.remove()
    assert key_of(model) == before


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "modeling.py"
    file.write_text("one = 1\n")
    before = file_digest(str(file))
    assert before == file_digest(str(file)) != ""
    file.write_text("one = 1  # and more\n")
    assert file_digest(str(file)) != before
    assert file_digest(str(tmp_path / "missing.py")) == file_digest(None) == ""


def test_the_package_digest_covers_passes_and_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    now = key_module.package_digest()  # kept for the process: before files are read otherwise
    monkeypatch.setattr(key_module, "file_digest", lambda path: read.append(path) or path)
    assert key_module.package_digest.__wrapped__() != now
    names = {Path(path).parent.name + "/" + Path(path).name for path in read}
    assert names >= {"policies/__init__.py", "cache/key.py", "plan/__init__.py"}
    assert any(name.endswith("/rewrite.py") for name in names)
