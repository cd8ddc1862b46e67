"""The cache of one engine: memory before disk, bounded, counted, and never harmed by the disk."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybrid_fx.cache.plan_cache import PlanCache
from hybrid_fx.errors import CacheError
from hybrid_fx.plan.plan import Manifest, Plan, load_functions

DIGESTS = [hashlib.sha256(bytes([index])).hexdigest() for index in range(5)]
DIGEST, OTHER, THIRD = DIGESTS[:3]


def make_plan(label: str = "x") -> Plan:
    manifest = Manifest(model=label, vocab_size=7, weights=(), prepared=(), kv=(), guards={})
    source = f'"""{label}"""\ndef f(x):\n    return op.linear(x)\n'
    return Plan(manifest=manifest, sources=dict.fromkeys(("prepare", "prefill", "decode"), source))


def make_cache(directory: Path | None, **options) -> PlanCache:
    return PlanCache(directory, operator_names=("linear",), **options)


def counts(cache: PlanCache) -> tuple[int, int, int]:
    return cache.hits_memory, cache.hits_disk, cache.misses


def test_memory_answers_before_the_disk_and_each_answer_is_counted(tmp_path):
    cache = make_cache(tmp_path / "plans")
    assert cache.get(DIGEST) is None
    assert counts(cache) == (0, 0, 1)
    plan = make_plan()
    cache.put(DIGEST, plan)
    assert cache.get(DIGEST) is plan
    assert counts(cache) == (1, 0, 1)
    fresh = make_cache(tmp_path / "plans")
    assert fresh.get(DIGEST) == plan
    assert fresh.get(DIGEST) is fresh.get(DIGEST)
    assert counts(fresh) == (2, 1, 0)


def test_without_a_directory_plans_live_in_memory_only():
    cache = make_cache(None)
    cache.put(DIGEST, make_plan())
    assert cache.get(DIGEST) == make_plan()
    assert make_cache(None).get(DIGEST) is None


def test_making_a_cache_and_missing_in_it_touch_no_file(tmp_path):
    assert make_cache(tmp_path / "plans").get(DIGEST) is None
    assert not (tmp_path / "plans").exists()


def test_two_caches_share_nothing_but_the_directory():
    first, second = make_cache(None), make_cache(None)
    first.put(DIGEST, make_plan())
    assert second.get(DIGEST) is None
    assert counts(first) == (0, 0, 0)


def test_the_plan_unused_for_longest_leaves_memory_first():
    cache = make_cache(None, memory=2)
    cache.put(DIGEST, make_plan("a"))
    cache.put(OTHER, make_plan("b"))
    assert cache.get(DIGEST) is not None
    cache.put(THIRD, make_plan("c"))
    assert cache.get(OTHER) is None
    assert cache.get(DIGEST) is not None
    assert cache.get(THIRD) is not None


def test_a_plan_that_left_memory_comes_back_from_the_disk(tmp_path):
    cache = make_cache(tmp_path / "plans", memory=1)
    cache.put(DIGEST, make_plan("a"))
    cache.put(OTHER, make_plan("b"))
    assert cache.get(DIGEST) == make_plan("a")
    assert counts(cache) == (0, 1, 0)


def test_memory_holds_a_bounded_number_of_plans():
    cache = make_cache(None, memory=3)
    mark = "plans of the bounded-memory test"
    for index in range(10):
        cache.put(f"{index:064x}", make_plan(mark))
    gc.collect()
    alive = [
        each for each in gc.get_objects() if type(each) is Plan and each.manifest.model == mark
    ]
    assert len(alive) == 3


def test_the_number_of_files_is_bounded(tmp_path):
    cache = make_cache(tmp_path / "plans", files=2)
    for digest in DIGESTS:
        cache.put(digest, make_plan())
    assert len(list((tmp_path / "plans").iterdir())) == 2


def test_a_disk_that_cannot_be_used_is_one_warning_and_memory_still_serves(tmp_path):
    (tmp_path / "plans").write_text("a file in the way")
    cache = make_cache(tmp_path / "plans")
    with pytest.warns(RuntimeWarning, match="cannot be read") as caught:
        assert cache.get(DIGEST) is None
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(DIGEST, make_plan())
        assert cache.get(DIGEST) == make_plan()


def test_an_illegal_source_under_a_right_checksum_is_a_miss_and_never_runs(tmp_path):
    directory = tmp_path / "plans"
    make_cache(directory).put(DIGEST, make_plan())
    (path,) = directory.iterdir()
    touched = tmp_path / "touched"
    envelope = json.loads(path.read_text())
    envelope["plan"]["sources"]["decode"] = [
        f"open({str(touched)!r}, 'w')",
        "def f(x):",
        " return x",
    ]
    spelled = json.dumps([1, DIGEST, envelope["plan"]], sort_keys=True, separators=(",", ":"))
    envelope["sha256"] = hashlib.sha256(spelled.encode()).hexdigest()
    path.write_text(json.dumps(envelope))
    cache = make_cache(directory)
    with pytest.warns(RuntimeWarning, match="outside a function") as caught:
        assert cache.get(DIGEST) is None
    assert len(caught) == 1
    assert not touched.exists()
    assert counts(cache) == (0, 0, 1)
    cache.put(DIGEST, make_plan())
    assert make_cache(directory).get(DIGEST) == make_plan()


def test_a_plan_from_the_disk_loads_and_runs(tmp_path):
    make_cache(tmp_path / "plans").put(DIGEST, make_plan())
    plan = make_cache(tmp_path / "plans").get(DIGEST)
    functions = load_functions(plan.sources["decode"], {"linear": lambda x: x + 1})
    assert functions["f"](1) == 2


@pytest.mark.parametrize("digest", ["", "../x", "not hex at all", None])
def test_a_digest_that_is_not_hexadecimal_is_a_cache_error(tmp_path, digest):
    for cache in (make_cache(None), make_cache(tmp_path / "plans")):
        with pytest.raises(CacheError, match="digest"):
            cache.get(digest)
        with pytest.raises(CacheError, match="digest"):
            cache.put(digest, make_plan())


digests = st.sampled_from(DIGESTS)


class CacheMachine(RuleBasedStateMachine):
    """Two caches of one directory against dictionaries, with accidents on the disk between."""

    @initialize()
    def begin(self):
        self.root = tempfile.TemporaryDirectory()
        self.directory = Path(self.root.name) / "plans"
        self.disk: dict[str, str] = {}  # digest -> label, for whole files
        self.damaged: set[str] = set()
        self.caches = [self.fresh(), self.fresh()]

    def fresh(self):
        """A cache and what its memory of two plans must hold, the oldest first."""
        return make_cache(self.directory, memory=2), {}, [0, 0, 0]

    def remember(self, memory, digest, label):
        memory.pop(digest, None)
        memory[digest] = label
        while len(memory) > 2:
            del memory[next(iter(memory))]

    def file(self, digest):
        return self.directory / f"{digest}.json"

    @rule(which=st.integers(0, 1), digest=digests, label=st.text(max_size=3))
    def put(self, which, digest, label):
        cache, memory, _ = self.caches[which]
        label = label.replace("\\", "").replace('"', "").replace("\0", "").replace("\r", "")
        cache.put(digest, make_plan(label))
        self.remember(memory, digest, label)
        self.disk[digest] = label
        self.damaged.discard(digest)

    @rule(which=st.integers(0, 1), digest=digests)
    def get(self, which, digest):
        cache, memory, expected = self.caches[which]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = cache.get(digest)
        if digest in memory:
            label = memory[digest]
            expected[0] += 1
        elif digest in self.disk:
            label = self.disk[digest]
            expected[1] += 1
        else:
            label = None
            expected[2] += 1
        assert plan == (None if label is None else make_plan(label))
        assert len(caught) == (digest in self.damaged and digest not in memory)
        if label is not None:
            self.remember(memory, digest, label)

    @rule(which=st.integers(0, 1))
    def begin_another_process(self, which):
        self.caches[which] = self.fresh()

    @rule(digest=digests, at=st.floats(0, 0.99))
    def cut_a_file_short(self, digest, at):
        if digest in self.disk:
            content = self.file(digest).read_bytes()
            self.file(digest).write_bytes(content[: int(at * (len(content) - 1))])
            del self.disk[digest]
            self.damaged.add(digest)

    @rule(digest=digests, other=digests)
    def copy_one_file_over_another(self, digest, other):
        if digest in self.disk and digest != other:
            content = self.file(digest).read_bytes()
            self.file(other).write_bytes(content)
            self.file(other).chmod(0o600)
            self.disk.pop(other, None)
            self.damaged.add(other)

    @rule(digest=digests)
    def put_a_link_in_place_of_a_file(self, digest):
        if digest in self.disk:
            target = self.file(digest).rename(Path(self.root.name) / digest)
            self.file(digest).symlink_to(target)
            del self.disk[digest]
            self.damaged.add(digest)

    @rule(digest=digests)
    def delete_a_file(self, digest):
        if digest in self.disk or digest in self.damaged:
            self.file(digest).unlink()
            self.disk.pop(digest, None)
            self.damaged.discard(digest)

    @invariant()
    def counters_are_those_of_the_model(self):
        for cache, _, expected in getattr(self, "caches", ()):
            assert list(counts(cache)) == expected

    def teardown(self):
        if hasattr(self, "root"):
            self.root.cleanup()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
