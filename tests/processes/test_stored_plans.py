"""What an engine does with a folder of plans it cannot use, and with plans that are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes.fresh_process import model_of, run_case
from tiny_models import prompt, tiny

import hybrid_fx
from hybrid_fx.cache import disk


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A folder with one sound plan for each case."""
    folders = {}
    for case in ("llama", "fold"):
        folders[case] = tmp_path_factory.mktemp(case)
        run_case(case, str(folders[case]))
    return folders


def spoiled(sound: Path, to: Path, spoil: Callable[[Path], None]) -> Path:
    """A copy of a folder whose one file ``spoil`` changed."""
    shutil.copytree(sound, to)
    (file,) = to.iterdir()
    spoil(file)
    return file


def edited(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the plan in a file, and give the file the checksum of what it holds now."""

    def spoil(file: Path) -> None:
        value = json.loads(file.read_text())
        before = json.dumps(value)
        edit(value["plan"])
        assert json.dumps(value) != before
        value["sha256"] = disk._checksum(value["key"], value["plan"])
        file.write_text(json.dumps(value))

    return spoil


def in_source(stage: str, old: str, new: str, count: int = -1) -> Callable[[Path], None]:
    def edit(plan: dict[str, Any]) -> None:
        text = "\n".join(plan["sources"][stage])
        assert old in text
        plan["sources"][stage] = text.replace(old, new, count).split("\n")

    return edited(edit)


def swap_weights(one: str, other: str) -> Callable[[Path], None]:
    """Let the prepare graph read two weights of one shape in each other's place."""

    def edit(plan: dict[str, Any]) -> None:
        for weight in plan["manifest"]["weights"]:
            name = weight["name"]
            weight["name"] = name.replace(one, other) if one in name else name.replace(other, one)

    return edited(edit)


UNREADABLE = {
    "empty": lambda file: file.write_bytes(b""),
    "half-written": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "one bit": lambda file: file.write_text(file.read_text().replace("1e-06", "1e-05", 1)),
    "of another key": lambda file: file.write_text(
        file.read_text().replace(file.stem, "0" * len(file.stem))
    ),
    "hostile": in_source("decode", "    return ", '    op.exec("import os")\n    return ', 1),
}
WRONG = {
    "eps": in_source("prefill", "1e-06", "0.5"),
    "scale of decode": in_source("decode", "0.3535533905932738", "0.3"),
    "scale of prefill": in_source("prefill", "0.3535533905932738", "0.3"),
    "two norms swapped": swap_weights("input_layernorm", "post_attention_layernorm"),
    "no such weight": swap_weights("input_layernorm", "no_such_norm"),
    "shapes that do not fit": in_source("prepare", "(prepared, 12, gather_6, ", "(prepared, 12, "),
    "functions missing": in_source("decode", "def decode(", "def other("),
    "memory missing": edited(lambda plan: plan["manifest"]["kv"].pop()),
}


def check_replaced(case: str, file: Path, message: str) -> None:
    """The file is not used, that is said once, and a sound plan stands in its place."""
    wanted = model_of(case).generate(**prompt((5, 3)), max_new_tokens=8, do_sample=False)
    run = run_case(case, str(file.parent))
    assert run["tokens"] == wanted.tolist()
    assert run["counters"]["captures"] == 1
    assert run["counters"]["prepares"] == 1
    assert run["counters"]["hf_forwards"] == 0
    assert run["fallbacks"] == {}
    assert len(run["warnings"]) == 1
    assert message in run["warnings"][0]
    again = run_case(case, str(file.parent))
    assert again["tokens"] == wanted.tolist()
    assert again["counters"]["captures"] == 0
    assert again["warnings"] == []


#: Each takes two captures or three: one of a kind always runs, the others are deep.
ALWAYS = {"half-written", "hostile", "eps", "two norms swapped", "no such weight"}


def kinds(faults: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.deep) for name in faults]


@pytest.mark.parametrize("damage", kinds(UNREADABLE))
def test_a_file_that_is_no_plan_is_one_warning_and_captured_anew(sound, tmp_path, damage):
    file = spoiled(sound["llama"], tmp_path / "plans", UNREADABLE[damage])
    check_replaced("llama", file, "is not used")


@pytest.mark.parametrize("fault", kinds(WRONG))
def test_a_valid_plan_that_is_wrong_for_the_model_is_found_and_replaced(sound, tmp_path, fault):
    file = spoiled(sound["llama"], tmp_path / "plans", WRONG[fault])
    check_replaced("llama", file, "stored plan of LlamaForCausalLM is not used")


def fresh_adapter(seed: int) -> Any:
    """A model in training's first state: norms of one, biases and LoRA's second factor zero."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    return peft.get_peft_model(tiny("llama"), config).eval()


def test_a_wrong_plan_is_found_while_an_adapter_still_is_zero(tmp_path):
    call = {**prompt((5, 3)), "max_new_tokens": 8, "do_sample": False}
    hybrid_fx.hybridize(fresh_adapter(0), cache_dir=str(tmp_path)).generate(**call)
    (file,) = tmp_path.iterdir()
    in_source("prepare", "2.0)", "3.0)")(file)
    engine = hybrid_fx.hybridize(fresh_adapter(0), cache_dir=str(tmp_path))
    with pytest.warns(RuntimeWarning, match="stored plan of PeftModel"):
        engine.generate(**call)
    assert engine.stats.counters["captures"] == 1
    assert engine.stats.fallbacks == {}


def test_a_wrong_plan_for_adapters_on_the_side_is_found_and_replaced(tmp_path):
    run_case("side", str(tmp_path))
    wanted = run_case("side", str(tmp_path))["tokens"]
    for file in tmp_path.iterdir():
        lines = json.loads(file.read_text())["plan"]["sources"]["decode"]
        if any("lora_A" in line for line in lines):
            in_source("decode", "1e-06", "0.5")(file)
    run = run_case("side", str(tmp_path))
    assert len(run["warnings"]) == 1
    assert run["counters"]["captures"] == 1
    assert run["tokens"] == wanted
    assert run["fallbacks"] == {}


def test_weights_that_hold_nan_neither_prove_nor_refute_a_plan(tmp_path):
    model = tiny("llama")
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = prompt((5, 5))["input_ids"]
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine = hybrid_fx.hybridize(model, cache_dir=str(tmp_path))
    engine.generate(ids, max_new_tokens=4, do_sample=False)
    assert engine.stats.fallbacks == {}
    model.load_state_dict(good)
    assert engine.generate(ids, max_new_tokens=4, do_sample=False).equal(wanted)
    assert engine.stats.fallbacks == {}
    assert engine.stats.counters["captures"] == 1


def test_without_a_disk_cache_nothing_is_written(tmp_path):
    run = run_case("llama", str(tmp_path / "plans"), disk_cache=False)
    assert run["counters"]["captures"] == 1
    assert run["fallbacks"] == {}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = run_case("llama", str(tmp_path / "file" / "plans"))
    assert len(run["warnings"]) == 1
    assert "cannot be" in run["warnings"][0]
    wanted = model_of("llama").generate(**prompt((5, 3)), max_new_tokens=8, do_sample=False)
    assert run["tokens"] == wanted.tolist()
    assert run["fallbacks"] == {}
