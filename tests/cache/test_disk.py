"""Plans on the disk: whole or absent, of this user alone, and nothing found there can hurt."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
import warnings
from pathlib import Path

import pytest

from hybrid_fx.cache import disk, private_files
from hybrid_fx.cache.disk import DiskStore, default_directory
from hybrid_fx.errors import CacheError
from hybrid_fx.plan.plan import Manifest, Plan

DIGEST = "0123456789abcdef"
OTHER = "fedcba9876543210"


def make_plan(label: str = "x") -> Plan:
    manifest = Manifest(
        model=label, vocab_size=7, weights=(), prepared=(), kv=(), guards={"label": label}
    )
    source = f'"""{label}"""\ndef f(x):\n    return op.linear(x)\n'
    return Plan(manifest=manifest, sources=dict.fromkeys(("prepare", "prefill", "decode"), source))


def make_store(directory: Path, **options) -> DiskStore:
    return DiskStore(directory, operator_names=("linear",), **options)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "plans")


@pytest.fixture
def path(store):
    """The file of a plan that was stored well."""
    assert store.write(DIGEST, make_plan())
    return store.path(DIGEST)


def read_with_one_warning(store: DiskStore, digest: str = DIGEST) -> str:
    """Read what must be a miss with exactly one warning; return its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.read(digest) is None
    assert [warning.category for warning in caught] == [RuntimeWarning]
    return str(caught[0].message)


def sign(envelope: dict) -> str:
    """The text of a file whose checksum is right, whatever it holds."""
    spelled = json.dumps([1, envelope["key"], envelope["plan"]], sort_keys=True,
                         separators=(",", ":"))  # fmt: skip
    envelope["sha256"] = hashlib.sha256(spelled.encode()).hexdigest()
    return json.dumps(envelope)


def test_another_store_reads_the_plan_that_one_wrote(store, tmp_path):
    plan = make_plan("\u03b1 \u2028 \x0c '")
    assert store.write(DIGEST, plan)
    assert make_store(tmp_path / "plans").read(DIGEST) == plan


def test_a_key_never_written_is_a_miss_without_a_warning_and_makes_no_directory(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(DIGEST) is None
        assert not store.directory.exists()
        store.write(DIGEST, make_plan())
        assert store.read(OTHER) is None


def test_a_later_plan_replaces_an_earlier_one(store, path):
    assert store.write(DIGEST, make_plan("later"))
    assert store.read(DIGEST) == make_plan("later")
    assert os.listdir(store.directory) == [path.name]


def test_directory_parents_and_file_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        store = make_store(tmp_path / "a" / "plans")
        store.write(DIGEST, make_plan())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path(DIGEST).stat().st_mode) == 0o600


def test_the_stored_file_is_json_that_a_person_can_read_line_by_line(path):
    text = path.read_text("ascii")
    envelope = json.loads(text)
    assert set(envelope) == {"format", "key", "sha256", "plan"}
    assert envelope["key"] == DIGEST
    assert '"    return op.linear(x)",\n' in text


def test_the_default_directory_follows_xdg_and_ignores_a_relative_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "hybrid_fx"
    for ignored in ("relative/path", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_directory() == tmp_path / ".cache" / "hybrid_fx"


def test_no_home_directory_is_a_cache_error(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CacheError, match="cache_dir"):
        default_directory()


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "../../etc/passwd",
        "A" * 16,
        "0" * 7,
        "0" * 129,
        "g" * 9,
        f"{DIGEST}\n",
        f"{DIGEST}/",
        None,
    ],
)
def test_a_digest_that_is_not_hexadecimal_never_becomes_a_path(store, digest):
    for call in (store.path, store.read, lambda digest: store.write(digest, make_plan())):
        with pytest.raises(CacheError, match="digest"):
            call(digest)


def test_half_a_file_is_one_warning_and_a_miss_at_any_length(store, path):
    whole = path.read_bytes()
    for length in (0, 1, 2, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        assert str(path) in read_with_one_warning(store)


def test_any_changed_byte_that_changes_the_content_is_one_warning_and_a_miss(store, path):
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 17):
        changed = bytes([whole[at] ^ 1])
        path.write_bytes(whole[:at] + changed + whole[at + 1 :])
        if not (whole[at : at + 1] + changed).isspace():
            read_with_one_warning(store)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95\x10\x00",
        b"\xff" * 100,
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b'"' + b"a" * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 400 + b"]" * 400,
        b"9" * 100_000,
        b'{"format": 1, "format": 1}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_something_else_is_one_warning_and_a_miss(store, path, content):
    path.write_bytes(content)
    read_with_one_warning(store)


def test_a_plan_copied_to_another_key_is_one_warning_and_a_miss(store, path):
    shutil.copy(path, store.path(OTHER))
    assert "another key" in read_with_one_warning(store, OTHER)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "return op.system(x)",
        "return op.__class__",
        "return op.linear.__globals__",
        "return ().__class__",
        "return getattr(x, 'a')",
        "return f(x)",
        "return 9**9**9",
        "return " + "(" * 300,
    ],
)
def test_an_illegal_source_under_a_right_checksum_is_one_warning_and_a_miss(store, path, line):
    envelope = json.loads(path.read_text())
    path.write_text(sign(envelope))
    assert store.read(DIGEST) == make_plan()
    envelope["plan"]["sources"]["decode"] = ["def f(x):", f"    {line}"]
    path.write_text(sign(envelope))
    assert "generated source, line 2" in read_with_one_warning(store)


def test_a_source_that_calls_an_operator_this_version_lacks_is_one_warning_and_a_miss(path):
    store = DiskStore(path.parent, operator_names=("matmul",))
    assert "op.linear" in read_with_one_warning(store)


def test_a_manifest_of_another_shape_under_a_right_checksum_is_one_warning_and_a_miss(store, path):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for manifest in ({}, None, deep, {"format": 1, "more": 1}):
        envelope = json.loads(path.read_text())
        envelope["plan"]["manifest"] = manifest
        path.write_text(sign(envelope))
        read_with_one_warning(store)


def test_a_field_named_twice_is_one_warning_and_a_miss(store, path):
    path.write_text(path.read_text().replace('"format": 1,', '"format": 1, "format": 1,', 1))
    assert "twice" in read_with_one_warning(store)


def test_a_format_of_another_version_is_one_warning_and_a_miss(store, path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert "format" in read_with_one_warning(store)


def test_a_link_a_pipe_and_a_directory_in_place_of_the_file_are_misses(store, path):
    real = path.rename(path.with_name("real"))
    path.symlink_to(real)
    read_with_one_warning(store)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in read_with_one_warning(store)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in read_with_one_warning(store)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert not store.write(DIGEST, make_plan())
    assert sorted(os.listdir(store.directory)) == [path.name, "real"]


def test_writing_replaces_a_link_and_leaves_what_it_points_to(store, path, tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    path.unlink()
    path.symlink_to(target)
    assert store.write(DIGEST, make_plan())
    assert target.read_text() == "precious"
    assert store.read(DIGEST) == make_plan()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc/self/fd")
def test_no_descriptor_stays_open_after_a_miss(store, path):
    before = len(os.listdir("/proc/self/fd"))
    path.unlink()
    path.mkdir()
    for _ in range(5):
        read_with_one_warning(store)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_beyond_the_size_limit_is_not_read(store, path, monkeypatch):
    monkeypatch.setattr(private_files, "MAX_BYTES", path.stat().st_size - 1)
    assert "above the limit" in read_with_one_warning(store)


def test_the_files_unused_for_longest_go_first(tmp_path):
    store = make_store(tmp_path / "plans", limit=3)
    digests = [f"{index:016x}" for index in range(5)]
    for age, digest in enumerate(digests[:3]):
        store.write(digest, make_plan(digest))
        os.utime(store.path(digest), (1000 + age, 1000 + age))
    assert store.read(digests[0]) is not None  # used: now the youngest
    store.write(digests[3], make_plan(digests[3]))
    store.write(digests[4], make_plan(digests[4]))
    left = {digest for digest in digests if store.read(digest) is not None}
    assert left == {digests[0], digests[3], digests[4]}


def test_pruning_touches_only_its_own_files_and_sweeps_what_dead_writers_left(tmp_path):
    store = make_store(tmp_path / "plans", limit=1)
    store.write(DIGEST, make_plan())
    names = {name: store.directory / name for name in (
        "notes.txt", "abc.json", f".{DIGEST}.old.tmp", f".{DIGEST}.new.tmp", "precious.tmp")
    }  # fmt: skip
    for file in names.values():
        file.write_text("")
    old = time.time() - 2 * disk.STALE_SECONDS
    for name in names:
        if "new" not in name:
            os.utime(names[name], (old, old))
    store.write(OTHER, make_plan())
    expected = {store.path(OTHER).name, *names} - {f".{DIGEST}.old.tmp"}
    assert set(os.listdir(store.directory)) == expected
