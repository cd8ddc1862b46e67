"""Generated source: one function a layer kind, readable, and safe from any name."""

from __future__ import annotations

import ast
import keyword

import pytest
import torch
from captured_models import canonical, model_of
from policy_graphs import logits, weights
from small_graphs import Builder, run, same, values
from tiny_models import tiny
from torch import fx, nn

from hybrid_fx.capture import capture
from hybrid_fx.passes.emit import emit
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.writer import wrapped
from hybrid_fx.plan.build import build_plan, normalize
from hybrid_fx.plan.plan import Plan, load_functions
from hybrid_fx.plan.source_check import check_source
from hybrid_fx.runtime.prepared import PreparedTensors

STAGES = ("prepare", "prefill", "decode")


def _plan(model: nn.Module, name: str = "tiny", **options: object) -> Plan:
    graph = normalize(capture(model).graph)
    return build_plan(graph, model=name, vocab_size=64, **options)  # type: ignore[arg-type]


def _functions(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def _prefilled(plan: Plan, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits of all tokens by the generated sources."""
    held = weights(model)
    prepared = PreparedTensors(plan.manifest.prepared)
    prepared.begin()
    functions = {s: load_functions(plan.sources[s], OPERATORS, name=s) for s in STAGES}
    ordered = [held[weight.name] for weight in plan.manifest.weights]
    rows, length = ids.shape
    with torch.no_grad():
        functions["prepare"]["prepare"](ordered, prepared)
        prepared.finish()
        memory = [
            [torch.zeros(rows, kv.kv_heads, length, size) for kv in plan.manifest.kv]
            for size in (plan.manifest.kv[0].head_size, plan.manifest.kv[0].value_head_size)
        ]
        slots = torch.arange(rows * length).reshape(rows, length)
        at = torch.arange(length).expand(rows, length)
        result: torch.Tensor = functions["prefill"]["prefill"](
            ids, at, slots, None, length, length, prepared.tensors, *memory, None
        )
    return result


@pytest.fixture(scope="module")
def shallow_and_deep() -> tuple[Plan, Plan]:
    shallow = build_plan(canonical("llama"), model="tiny", vocab_size=64)
    return shallow, _plan(tiny("llama", layers=10))


def test_one_function_at_two_and_at_ten_layers(shallow_and_deep: tuple[Plan, Plan]) -> None:
    shallow, deep = shallow_and_deep
    for stage, layer in (
        ("prepare", "prepare_layer"),
        ("prefill", "decoder_layer"),
        ("decode", "decoder_layer"),
    ):
        assert _functions(deep.sources[stage]) == [layer, stage]
        first = {s.split("\n\n\n")[0] for s in (shallow.sources[stage], deep.sources[stage])}
        assert len(first) == 1, "the layer function is the same text at both depths"
        assert deep.sources[stage].count(f" = {layer}(") == 10


def test_the_text_names_no_layer_and_no_module(shallow_and_deep: tuple[Plan, Plan]) -> None:
    for plan in shallow_and_deep:
        for source in plan.sources.values():
            for word in ("layers", "model", "Llama", "tiny", "lm_head"):
                assert word not in source


def test_lines_are_narrow_and_memory_is_given_back(shallow_and_deep: tuple[Plan, Plan]) -> None:
    for plan in shallow_and_deep:
        for stage, source in plan.sources.items():
            wide = [line for line in source.split("\n") if len(line) > 100]
            assert not wide, wide[:3]
            assert "del " in source
            check_source(source, OPERATORS.keys())
            assert source.isascii(), stage


def test_every_value_is_dropped_after_its_last_use(shallow_and_deep: tuple[Plan, Plan]) -> None:
    """At the return of a function only what it returns and its parameters are left."""
    for source in shallow_and_deep[1].sources.values():
        for function in ast.parse(source).body:
            assert isinstance(function, ast.FunctionDef)
            left = set()
            for statement in function.body:
                if isinstance(statement, ast.Assign):
                    left |= {
                        n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)
                    }
                elif isinstance(statement, ast.Delete):
                    left -= {n.id for n in statement.targets if isinstance(n, ast.Name)}
            last = function.body[-1]
            returned = {n.id for n in ast.walk(last) if isinstance(n, ast.Name)}
            assert left <= returned, f"{left - returned} live on in {function.name}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "opt350", "phi3", "mistral"])
def test_the_source_computes_what_the_graph_computes(kind: str) -> None:
    model = model_of(kind)
    plan = build_plan(canonical(kind), model=kind, vocab_size=64, fusions="all")
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 7), generator=rng)
    wanted = logits(canonical(kind), weights(model))
    assert torch.allclose(_prefilled(plan, model, ids), wanted, atol=1e-5)


def test_two_kinds_of_layer_where_windows_alternate() -> None:
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
    plan = _plan(transformers.Gemma3ForCausalLM(config).eval())
    assert _functions(plan.sources["decode"]) == ["decoder_layer", "decoder_layer_2", "decode"]
    assert plan.sources["decode"].count(" = decoder_layer(") == 5
    assert plan.sources["decode"].count(" = decoder_layer_2(") == 1
    assert [kv.window for kv in plan.manifest.kv] == [4, 4, 4, 4, 4, None]


def test_a_layer_that_was_changed_gets_a_function_of_its_own() -> None:
    model = tiny("llama", layers=3)
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out * 2.0)
    plan = _plan(model)
    assert _functions(plan.sources["prefill"]) == ["decoder_layer", "decoder_layer_2", "prefill"]


HOSTILE = [
    'x"); import os #',
    "two\nlines",
    "naïve",
    "__import__",
    "class",
    "None",
    "decode",
    "decoder_layer",
    "op",
    "prepared",
    "Ellipsis",
    "1st",
    "'''",
    "λ",
]


class _Odd(nn.Module):
    """Adds a parameter of any name to what it wraps."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner = inner
        self._parameters[name] = nn.Parameter(torch.tensor(0.5))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * self._parameters[self.name]
        return result


def _renamed(graph: fx.Graph, name: str) -> fx.Graph:
    """A weight of the second layer, and the node itself, under a hostile name."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get("weight", "").endswith("o_proj.weight"):
            prefix = node.meta["weight"].removesuffix("self_attn.o_proj.weight")
            node.meta["weight"] = prefix + name
            node.name = "hostile"
    return graph


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reaches_the_source_but_as_a_plain_identifier(name: str) -> None:
    plan = build_plan(_renamed(canonical("llama"), name), model=name, vocab_size=64)
    assert f"model.layers.0.{name}" in [weight.name for weight in plan.manifest.weights]
    assert plan.manifest.model == name
    assert Plan.from_json(plan.to_json()) == plan
    for stage, source in plan.sources.items():
        load_functions(source, OPERATORS, name=stage)
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        names |= {n.arg for n in ast.walk(ast.parse(source)) if isinstance(n, ast.arg)}
        assert all(word.isidentifier() and not keyword.iskeyword(word) for word in names)
        assert "import" not in source.replace("x___import__", "").replace("import_os", "")
        assert "\n\n\n\n" not in source


def test_a_captured_model_with_an_odd_parameter_runs() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = _Odd(layer.mlp, 'w" * 2')
    plan = _plan(model, 'a "model"')
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 7), generator=rng)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(_prefilled(plan, model, ids), wanted, atol=1e-5)


def _source(graph: fx.Graph, layers: tuple[str, ...] = ()) -> str:
    names = [n.meta["input"] for n in graph.nodes if n.op == "placeholder"]
    return emit(graph, function="f", parameters=names, layer_name="layer", layers=layers)


CONSTANTS = [
    (1.5, -2.0),
    (float("inf"), float("-inf")),
    (None, True),
    (slice(None, -1, 2), ...),
    (torch.float16, "text, and (more)"),
]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_are_spelled_as_python_reads_them(constant: tuple[object, ...]) -> None:
    build = Builder()
    x = build.input("x", 2)
    node = build.graph.call_function(OPERATORS["getitem"], (x, constant))
    node.meta |= {"path": "", "val": None}
    source = _source(build.output(node))
    functions = load_functions(source, {**OPERATORS, "getitem": lambda _, index: index})
    assert functions["f"](None) == constant


def test_long_text_is_never_broken() -> None:
    line = "a = op.f(" + ", ".join(["'one, two'"] * 20) + ")"
    assert wrapped(line, "    ") == "    " + line


@pytest.mark.parametrize(
    "line",
    [
        "return " + ", ".join(f"value_{i}" for i in range(30)),
        ", ".join(f"value_{i}" for i in range(30)) + " = f(" + ", ".join(["a"] * 60) + ")",
        "x = f(" + ", ".join(f"(a, [b, {i}])" for i in range(30)) + ", 'word')",
        "def f(" + ", ".join(f"a_{i}" for i in range(40)) + "): pass",
        "x = f(a, b)",
    ],
)
def test_a_broken_line_is_narrow_and_means_the_same(line: str) -> None:
    broken = wrapped(line, "    ")
    assert all(len(part) <= 100 for part in broken.split("\n"))

    def read(body: str) -> str:
        return ast.dump(ast.parse(f"def g():\n{body}"))

    assert read(broken) == read("    " + line)


def test_a_layer_whose_inputs_cannot_come_first_is_written_into_the_root() -> None:
    """What stands between reads memory that the layer writes: its place must stay."""
    build = Builder()
    x, y = build.input("x", 3), build.input("y", 3)
    build.call("add_", x, 1.0, path="layers.0")
    between = build.call("neg", x, path="")
    build.call("mul_", x, 2.0, path="layers.0")
    out = build.call("add", between, y, path="layers.0")
    graph = build.output(build.call("exp", out, path=""))
    source = _source(graph, ("layers.0",))
    assert _functions(source) == ["f"]
    given = values(graph)
    functions = load_functions(source, OPERATORS)
    assert same(functions["f"](given["x"].clone(), given["y"]), run(graph, given)[0])


def test_what_stands_between_is_pulled_up_where_it_is_free() -> None:
    build = Builder()
    x = build.input("x", 3)
    first = build.call("neg", x, path="layers.0")
    between = build.call("exp", x, path="")
    out = build.call("add", first, between, path="layers.0")
    graph = build.output(out)
    source = _source(graph, ("layers.0",))
    assert _functions(source) == ["layer", "f"]
    given = values(graph)
    assert same(load_functions(source, OPERATORS)["f"](given["x"]), run(graph, given)[0])


def test_emitting_changes_nothing_and_says_the_same_twice() -> None:
    plans = [build_plan(canonical("gpt2"), model="m", vocab_size=64) for _ in range(2)]
    assert plans[0] == plans[1]
