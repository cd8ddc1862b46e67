"""Several processes on one directory of plans, for real: forked, killed and cut short."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import pytest

from hybrid_fx.cache.disk import DiskStore
from hybrid_fx.plan.plan import Manifest, Plan

DIGEST = "0123456789abcdef"
OTHER = "fedcba9876543210"

# Forked children only read and write files.
forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs fork"
)


def make_plan(label: str = "x", *, size: int = 0) -> Plan:
    manifest = Manifest(
        model=label, vocab_size=7, weights=(), prepared=(), kv=(), guards={"label": label}
    )
    source = f'"""{label}"""\ndef f(x):\n    return op.linear(x)\n' + "# filler\n" * size
    return Plan(manifest=manifest, sources=dict.fromkeys(("prepare", "prefill", "decode"), source))


def make_store(directory: Path, **options) -> DiskStore:
    return DiskStore(directory, operator_names=("linear",), **options)


def write_and_read(directory: Path, label: str, limit: int, outcome) -> None:
    store = make_store(directory, limit=limit)
    warnings.simplefilter("error")
    seen = []
    for index in range(25):
        assert store.write(DIGEST, make_plan(label, size=500 * (index % 3)))
        plan = store.read(DIGEST)
        seen.append(None if plan is None else plan.manifest.model)
        store.write(f"{os.getpid():08x}{index:08x}", make_plan(label))
    outcome.put(seen)


@forks
@pytest.mark.parametrize("limit", [3, 256])
def test_processes_writing_at_once_read_whole_plans_only(tmp_path, limit):
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    labels = {"one", "two", "three"}
    children = [
        context.Process(target=write_and_read, args=(tmp_path / "plans", label, limit, outcome))
        for label in labels
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    seen = {label for _ in children for label in outcome.get()}
    # One process may prune what another wrote a moment ago: a miss, and only then.
    assert seen & labels
    assert seen <= (labels | {None} if limit == 3 else labels)
    files = os.listdir(tmp_path / "plans")
    assert len(files) <= (2 * limit if limit == 3 else 76)
    assert not [name for name in files if name.endswith(".tmp")]


def write_until_killed(directory: Path, started) -> None:
    store = make_store(directory)
    index = 0
    while True:
        store.write(DIGEST, make_plan(f"{index}", size=3000))
        index += 1
        started.set()


@forks
def test_a_process_killed_in_the_middle_of_a_write_leaves_a_whole_plan(tmp_path):
    context = multiprocessing.get_context("fork")
    store = make_store(tmp_path / "plans")
    for pause in range(5):
        started = context.Event()
        child = context.Process(target=write_until_killed, args=(store.directory, started))
        child.start()
        assert started.wait(60)
        time.sleep(0.003 * pause)
        child.kill()
        child.join(60)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store.read(DIGEST) is not None


def write_with_little_space(directory: Path, outcome) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    store = make_store(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = store.write(OTHER, make_plan())
    outcome.put((written, len(caught), store.read(DIGEST) == make_plan()))


@forks
def test_a_write_the_system_cuts_short_is_one_warning_and_leaves_no_litter(tmp_path):
    store = make_store(tmp_path / "plans")
    assert store.write(DIGEST, make_plan())
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=write_with_little_space, args=(store.directory, outcome))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert outcome.get() == (False, 1, True)
    assert os.listdir(store.directory) == [f"{DIGEST}.json"]
