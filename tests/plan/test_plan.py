"""Plans and manifests: exact through JSON, strict when read."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_fx.errors import CacheError
from hybrid_fx.plan.plan import FORMAT, Manifest, Plan
from hybrid_fx.plan.records import KVLayer, Prepared, Streamed, Weight

PLAN_KEYS = ("prepare", "prefill", "decode")


def manifest() -> Manifest:
    return Manifest(
        model="LlamaForCausalLM",
        vocab_size=32,
        weights=(Weight(name="model.embed.weight", shape=(32, 8), dtype="bfloat16"),),
        prepared=(
            Prepared(
                name="qkv_0", recipe="concat_qkv(…)", shape=(16, 8), dtype="float32",
                owns_memory=True, packed=True,
            ),
        ),
        kv=(
            KVLayer(
                path="model.layers.0.self_attn", kv_heads=2, head_size=4, value_head_size=4,
                window=None, dtype="float32",
            ),
        ),
        streamed=(Streamed(layer=0, name="up.weight", shape=(8, 8), dtype="bfloat16"),),
        guards={"max_position_embeddings": 64, "scaling": None, "windows": [4, None]},
        notes=("a note",),
        layers=({"path": "model.layers.0", "policy": "llama", "fused": ["qkv"], "missed": []},),
    )  # fmt: skip


def plan() -> Plan:
    return Plan(
        manifest=manifest(),
        sources={"prepare": "a\n", "prefill": "", "decode": "\u03b1\r\n\n\x0c'\"\\\u2028"},
    )


texts = st.text(max_size=12)
sizes = st.integers(1, 2**40)
shapes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "int64", "bool", "float8_e4m3fn"])
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
manifests = st.builds(
    Manifest,
    model=texts,
    vocab_size=sizes,
    weights=st.lists(st.builds(Weight, name=texts, shape=shapes, dtype=dtypes), max_size=3),
    prepared=st.lists(
        st.builds(
            Prepared,
            name=texts,
            recipe=texts,
            shape=shapes,
            dtype=dtypes,
            owns_memory=st.booleans(),
            packed=st.booleans(),
            folded=st.booleans(),
            stacked=st.lists(texts, max_size=3),
        ),
        max_size=3,
    ),
    kv=st.lists(
        st.builds(
            KVLayer,
            path=texts,
            kv_heads=sizes,
            head_size=sizes,
            value_head_size=sizes,
            window=st.none() | sizes,
            dtype=dtypes,
        ),
        max_size=3,
    ),
    guards=st.dictionaries(texts, values, max_size=3),
    notes=st.lists(values, max_size=3),
    layers=st.lists(values, max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(manifest=manifests, sources=st.tuples(texts, texts, texts))
def test_a_plan_equals_the_one_read_back_from_its_own_json_text(manifest, sources):
    written = Plan(manifest=manifest, sources=dict(zip(PLAN_KEYS, sources, strict=True)))
    text = json.dumps(written.to_json(), allow_nan=False)
    read = Plan.from_json(json.loads(text))
    assert read == written
    assert json.dumps(read.to_json()) == text


def test_the_pinned_plan_survives_json_with_every_kind_of_line_end():
    assert Plan.from_json(json.loads(json.dumps(plan().to_json()))) == plan()


def test_tuples_inside_reports_become_lists_so_that_equality_survives_json():
    made = Manifest(
        model="", vocab_size=1, weights=[], prepared=[], kv=[], guards={"a": (1, (2,))},
        layers=({"fused": ("qkv", "mlp")},),
    )  # fmt: skip
    assert made.guards == {"a": [1, [2]]}
    assert made.layers == ({"fused": ["qkv", "mlp"]},)
    assert Manifest.from_json(made.to_json()) == made


def test_a_shape_given_as_torch_size_is_stored_as_plain_ints():
    weight = Weight(name="w", shape=torch.empty(2, 3).shape, dtype="float32")
    assert type(weight.shape) is tuple
    assert weight.shape == (2, 3)


FREE = {("manifest", "guards"): dict} | {
    ("manifest", name): list for name in ("notes", "layers", "lora", "passes")
}
"""Fields that hold any JSON values, and the type that holds them."""
ODD = (None, True, 1.5, 0.0, -1, "odd", b"odd", ["odd", 1], {"odd": 1}, object)


def places(value, at=()):
    """The path and value of every entry of a plan's JSON whose type is fixed."""
    yield at, value
    if isinstance(value, dict | list) and at not in FREE:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(entry, (*at, key))


def replaced(at, new):
    """The plan's JSON with ``new`` at the path ``at``."""
    whole = {"": plan().to_json()}
    parent, key = whole, ""
    for step in at:
        parent, key = parent[key], step
    parent[key] = new
    return whole[""]


def belongs(at, right, odd):
    """Whether ``odd`` is a legal value where ``right`` stands."""
    if at in FREE:
        return type(odd) is FREE[at]
    if at[-1:] == ("window",):
        return odd is None
    scalar = type(odd) is type(right) and not isinstance(right, dict | list)
    return scalar and odd != -1 and at[-1] != "dtype"


@pytest.mark.parametrize(
    ("at", "odd"),
    [
        pytest.param(at, odd, id=f"{'.'.join(map(str, at))}={odd!r:.12}")
        for at, right in places(plan().to_json())
        for odd in ODD
        if not belongs(at, right, odd)
    ],
)
def test_a_value_of_another_type_anywhere_is_a_cache_error(at, odd):
    with pytest.raises(CacheError):
        Plan.from_json(replaced(at, odd))


@pytest.mark.parametrize(
    ("at", "record"),
    [
        pytest.param(at, value, id=".".join(map(str, at)) or "plan")
        for at, value in places(plan().to_json())
        if isinstance(value, dict) and at not in FREE
    ],
)
def test_a_missing_or_unknown_field_anywhere_is_a_cache_error(at, record):
    for gone in record:
        rest = {key: entry for key, entry in record.items() if key != gone}
        with pytest.raises(CacheError):
            Plan.from_json(replaced(at, rest))
    with pytest.raises(CacheError):
        Plan.from_json(replaced(at, {**record, "more": ["1"]}))


@pytest.mark.parametrize(
    "odd",
    [
        float("nan"),
        float("inf"),
        2**64,
        {1: 2},
        {"a": object()},
        [{"a": b""}],
        {"a"},
        torch.ones(1),
    ],
)
def test_a_report_that_json_cannot_give_back_is_refused_when_the_manifest_is_made(odd):
    with pytest.raises(CacheError, match=r"Manifest\.notes"):
        Manifest(model="", vocab_size=1, weights=(), prepared=(), kv=(), guards={}, notes=(odd,))


def test_a_report_nested_without_end_is_refused():
    odd: list = []
    odd.append(odd)
    with pytest.raises(CacheError, match="deeper"):
        Manifest(model="", vocab_size=1, weights=(), prepared=(), kv=(), guards={"a": odd})


def test_another_format_is_refused_with_the_known_one():
    value = manifest().to_json() | {"format": FORMAT + 1}
    with pytest.raises(CacheError, match=f"format={FORMAT + 1} must be {FORMAT}"):
        Manifest.from_json(value)


def test_a_plan_has_exactly_the_three_sources():
    for keys in (("prepare", "prefill"), (*PLAN_KEYS, "more")):
        with pytest.raises(CacheError, match="prepare, prefill, decode"):
            Plan(manifest=manifest(), sources=dict.fromkeys(keys, ""))


def test_a_plan_does_not_change_with_the_mapping_it_was_made_from():
    sources = dict.fromkeys(PLAN_KEYS, "")
    made = Plan(manifest=manifest(), sources=sources)
    sources["decode"] = "changed"
    assert made.sources["decode"] == ""


def test_a_plan_can_be_copied_and_pickled_by_the_user():
    assert copy.deepcopy(plan()) == plan()
    assert pickle.loads(pickle.dumps(plan())) == plan()


def test_broken_guards_name_the_guard_the_plan_and_the_model():
    made = manifest()
    assert made.broken_guards({**made.guards, "more": 1}) == ()
    assert made.broken_guards({**made.guards, "windows": (4, None)}) == ()
    (line,) = made.broken_guards({**made.guards, "max_position_embeddings": 128})
    assert "max_position_embeddings" in line
    assert "64" in line
    assert "128" in line
    assert len(made.broken_guards({})) == 3
    assert len(made.broken_guards({**made.guards, "scaling": False})) == 1


def test_broken_guards_tell_true_from_one_and_one_from_one_point_zero():
    made = Manifest(
        model="", vocab_size=1, weights=(), prepared=(), kv=(), guards={"a": 1, "b": [True]}
    )
    assert len(made.broken_guards({"a": True, "b": [1]})) == 2
    assert len(made.broken_guards({"a": 1.0, "b": [True]})) == 1
