"""What generating does not work with is said by name, before anything is changed."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from test_layout import imports, module_name, sources
from tiny_models import tiny
from torch import nn

import hybrid_fx
from hybrid_fx.config import HybridConfig
from hybrid_fx.distributed.block import HybridBlock, options_of
from hybrid_fx.distributed.refusals import (
    RULES,
    Setup,
    check_engine,
    check_model,
    check_options,
    check_setup,
    refused,
)
from hybrid_fx.distributed.team import check_degree
from hybrid_fx.errors import ConfigError, HybridError, InputError


class Unit:
    """A model-parallel unit of one degree."""

    def __init__(self, **degrees: int) -> None:
        for name, degree in degrees.items():
            setattr(self, f"get_{name}_world_size", lambda degree=degree: degree)


def setup(config: dict[str, Any] | None = None, **given: Any) -> Setup:
    """A setup with the hybrid engine enabled."""
    config = {"hybrid_engine": {"enabled": True}, **(config or {})}
    return Setup(config=config, block=HybridBlock.of(config), **given)


def zero(**fields: Any) -> Setup:
    """A setup with these fields of ZeRO."""
    return setup({"zero_optimization": fields})


#: A config in which ranks generate together.
TEAM = {"hybrid_engine": {"enabled": True, "inference_tp_size": 2}}

#: One setup for each rule, in their order.
REFUSED = [
    setup({"tensor_parallel": {"autotp_size": 4}}),
    setup({"sequence_parallel_size": 2}),
    zero(stage=3, offload_param={"device": "nvme"}),
    zero(stage=3, zero_quantized_weights=True),
    zero(stage=3, mics_shard_size=2),
    zero(stage=2, zenflow={"topk_ratio": 0.1}),
    setup({"compile": {"deepcompile": True}}),
    setup({"expert_parallel": {"enabled": True}}),
]
MORE = [
    (setup(mesh=(2, 2)), "sequence parallelism"),
    (setup(mpu=Unit(sequence_parallel=2)), "sequence parallelism"),
    (zero(stage=3, offload_optimizer={"device": "nvme"}), "NVMe"),
    (zero(stage=3, zero_hpz_partition_size=2), "hpZ"),
]
ACCEPTED = [
    setup(
        {
            "hybrid_engine": {"enabled": True, "inference_tp_size": 2, "pin_parameters": False},
            "zero_optimization": {"stage": 3},
        }
    ),
    setup(),
    setup({"zero_optimization": True}),
    setup({"hybrid_engine": {"inference_tp_size": 2}}),
    setup(mpu=Unit(model_parallel=1, sequence_parallel=1), mesh=(2, 1)),
    zero(stage=3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
    zero(stage=3, zero_hpz_partition_size=1, zero_quantized_weights=False),
    setup({"hybrid_engine": {"pin_parameters": False}, "zero_optimization": {"stage": 3}}),
    setup({"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": False}}),
]


def test_each_rule_has_a_case() -> None:
    assert len(REFUSED) == len(RULES)


@pytest.mark.parametrize(("case", "rule"), [*zip(REFUSED, RULES, strict=True)])
def test_what_is_not_supported_is_refused_by_name(case: Setup, rule: Any) -> None:
    assert list(refused(case)) == [f"{rule[0]}: {rule[2]}"]
    with pytest.raises(ConfigError) as error:
        check_setup(case)
    assert rule[0] in str(error.value)


@pytest.mark.parametrize(("case", "said"), MORE)
def test_other_spellings_are_refused_too(case: Setup, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_setup(case)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_supported_is_not_refused(case: Setup) -> None:
    check_setup(case)


def test_all_that_is_wrong_is_said_at_once() -> None:
    case = zero(stage=3, mics_shard_size=2, zero_quantized_weights=True)
    with pytest.raises(ConfigError, match=r"ZeRO\+\+.*MiCS"):
        check_setup(case)


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_graph"):
        check_options(HybridConfig(train_graph=True), setup())
    check_options(HybridConfig(), setup(TEAM))


@pytest.mark.parametrize("graph", ["inductor", "cudagraphs"])
def test_graphs_with_collectives_are_not_lowered(graph: Any) -> None:
    lowered = HybridConfig(graph=graph)
    with pytest.raises(ConfigError, match=f"graph='{graph}' does not lower graphs with coll"):
        check_options(lowered, setup(TEAM))
    check_options(lowered, setup())


@pytest.mark.parametrize(
    ("size", "mpu", "world", "said"),
    [
        (2, None, 3, "inference_tp_size=2 does not divide the 3 ranks"),
        (4, None, 2, "inference_tp_size=4 does not divide the 2 ranks"),
        (2, Unit(model_parallel=4), 8, "=2, and the mpu states a model-parallel degree of 4"),
        (1, Unit(tensor_model_parallel=2), 2, "=1, and the mpu states a model-parallel degree"),
        (2, Unit(model_parallel=1), None, "=2, and the mpu states a model-parallel degree of 1"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused_with_both_numbers(
    size: int, mpu: Any, world: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_degree(size, mpu, world)


def test_a_degree_that_fits_is_not_refused() -> None:
    check_degree(1, None, 3)
    check_degree(2, None, None)
    check_degree(2, Unit(tensor_model_parallel=2), 4)
    check_degree(1, Unit(sequence_parallel=2), 4)


def test_a_model_that_is_sliced_already_is_refused_by_name() -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    from hybrid_fx.distributed.seam import sliced_part

    model = tiny("llama")
    assert sliced_part(model) == ""
    model.lm_head.weight.tensor_model_parallel = True
    with pytest.raises(ConfigError, match=r"sliced already \(lm_head.weight, marked"):
        check_model(model, pipeline=False, experts=False, sliced=sliced_part(model))
    linear = type("LinearAllreduce", (nn.Linear,), {"__module__": "deepspeed.module_inject.layers"})
    model.model.layers[1].mlp.down_proj = linear(2, 2)
    assert sliced_part(model) == "model.layers.1.mlp.down_proj, a LinearAllreduce of AutoTP"


@pytest.mark.parametrize(
    "asked",
    [
        {"hybrid_engine": {"enabled": True}, "hybrid_fx": {"graph": "cudagraphs"}},
        {"hybrid_engine": {"enabled": True, "enable_cuda_graph": True}},
    ],
)
def test_steps_are_not_recorded_where_deepspeed_puts_the_model(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    from hybrid_fx.distributed import seam

    monkeypatch.setattr(seam, "accelerator_device", lambda: torch.device("cpu"))
    model = tiny("llama")
    before = dict(vars(model))
    with pytest.raises(ConfigError, match=r'the model is on cpu; .*graph="eager"'):
        hybrid_fx.initialize(model=model, config={"train_batch_size": 1, **asked})
    assert vars(model) == before


@pytest.mark.parametrize("graph", ["inductor", "cudagraphs"])
def test_layers_that_gather_are_not_lowered(graph: Any) -> None:
    unpinned = {"hybrid_engine": {"enabled": True, "pin_parameters": False}}
    lowered = HybridConfig(graph=graph)
    check_options(lowered, setup({**unpinned, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ConfigError, match=f"graph='{graph}' does not lower"):
        check_options(lowered, setup({**unpinned, "zero_optimization": {"stage": 3}}))


@pytest.mark.parametrize("kind", ["a pipeline engine", "DeepSpeed's own hybrid engine"])
def test_engines_of_another_kind_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=kind):
        check_engine(kind)


def test_the_block_is_read_verbatim() -> None:
    assert HybridBlock.of({}) == HybridBlock()
    block = {
        "enabled": True,
        "max_out_tokens": 100,
        "inference_tp_size": 2,
        "release_inference_cache": True,
        "pin_parameters": False,
        "tp_gather_partition_size": 4,
        "enable_cuda_graph": True,
    }
    read = HybridBlock.of({"hybrid_engine": block})
    assert {name: getattr(read, name) for name in block} == block
    options = options_of({"hybrid_fx": {"lora": "side", "max_out_tokens": 9}}, read)
    assert (options.max_out_tokens, options.release_inference_cache) == (9, True)
    assert (options.lora, options.graph) == ("side", "cudagraphs")
    assert options_of({"hybrid_fx": {"graph": "eager"}}, read).graph == "eager"
    assert options_of({}, HybridBlock()) == HybridConfig(max_out_tokens=512)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"enabld": True}, "did you mean 'enabled'"),
        ({"max_out_tokens": 0}, "must be 1 or more"),
        ({"pin_parameters": "yes"}, "must be true or false"),
        ([], None),
        (["enabled"], "must be an object"),
    ],
)
def test_a_bad_block_is_refused_with_its_field(block: Any, said: str | None) -> None:
    if said is None:
        assert HybridBlock.of({"hybrid_engine": block}) == HybridBlock()
        return
    with pytest.raises(ConfigError, match=said):
        HybridBlock.of({"hybrid_engine": block})


def test_the_front_door_has_deepspeeds_signature_and_defaults() -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="needs deepspeed")
    theirs = inspect.signature(deepspeed.initialize).parameters
    ours = inspect.signature(hybrid_fx.initialize).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_the_block_has_deepspeeds_fields_and_defaults() -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    from deepspeed.runtime.config import HybridEngineConfig

    theirs = HybridEngineConfig().model_dump()
    known = {name: getattr(HybridBlock(), name) for name in theirs}
    assert known == theirs


def test_nothing_is_changed_before_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    import torch.distributed

    model = tiny("llama")
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "hybrid_engine": {"enabled": True, "inference_tp_size": 2},
    }
    given = copy.deepcopy(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="inference_tp_size=2 does not divide the 3 ranks"):
        hybrid_fx.initialize(model=model, config=config)
    with pytest.raises(InputError, match="does not generate"):
        good = {**config, "hybrid_engine": {"enabled": True}}
        hybrid_fx.initialize(model=nn.Linear(2, 2), config=good)
    assert config == given
    assert not torch.distributed.is_initialized()
    assert {name: vars(module) for name, module in model.named_modules()} == before


def test_a_model_that_is_hybridized_is_not_initialised_again() -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    model = tiny("llama")
    config = {"train_micro_batch_size_per_gpu": 1, "hybrid_engine": {"enabled": True}}
    with hybrid_fx.hybridize(model), pytest.raises(InputError, match="hybridized already"):
        hybrid_fx.initialize(model=model, config=config)


def test_without_deepspeed_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(HybridError, match=r"hybrid_fx\[deepspeed\]"):
        hybrid_fx.initialize(model=tiny("llama"), config={})


def test_one_module_alone_imports_deepspeed() -> None:
    found = {
        module_name(path)
        for path in sources()
        for _, imported in imports(path)
        if imported.split(".")[0] == "deepspeed"
    }
    assert found == {"hybrid_fx.distributed.seam"}
