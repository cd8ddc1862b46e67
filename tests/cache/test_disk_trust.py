"""Whose files and directories count, and what a disk that refuses leads to."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from pathlib import Path

import pytest

from hybrid_fx.cache import private_files
from hybrid_fx.cache.disk import DiskStore
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


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_one_warning_and_a_miss(store, path, mode):
    path.chmod(mode)
    assert f"{mode:04o}" in read_with_one_warning(store)


def test_a_file_of_another_user_is_one_warning_and_a_miss(store, path, monkeypatch):
    inner = private_files.check_owner

    def check(found, where, kind):
        """As if the directory alone were ours."""
        if kind == "file":
            monkeypatch.setattr(os, "getuid", lambda: found.st_uid + 1)
        inner(found, where, kind)

    monkeypatch.setattr(private_files, "check_owner", check)
    assert "belongs to user" in read_with_one_warning(store)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_not_used_and_warned_of_once(store, path, mode):
    store.directory.chmod(mode)
    assert "chmod" in read_with_one_warning(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(DIGEST) is None
        assert not store.write(OTHER, make_plan())
    assert os.listdir(store.directory) == [path.name]


def test_a_directory_of_another_user_is_not_used_and_warned_of_once(store, path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: store.directory.stat().st_uid + 1)
    assert "belongs to user" in read_with_one_warning(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.write(OTHER, make_plan())
    assert os.listdir(store.directory) == [path.name]


def test_a_directory_others_may_only_read_is_used(store, path):
    store.directory.chmod(0o755)
    assert store.read(DIGEST) == make_plan()


def test_a_file_in_place_of_the_directory_is_warned_of_once(tmp_path):
    (tmp_path / "plans").write_text("a file")
    for directory in (tmp_path / "plans", tmp_path / "plans" / "below"):
        store = make_store(directory)
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert not store.write(DIGEST, make_plan())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not store.write(DIGEST, make_plan())
            assert store.read(DIGEST) is None
    assert (tmp_path / "plans").read_text() == "a file"


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [(os, "fsync", errno.ENOSPC), (os, "replace", errno.EROFS), (tempfile, "mkstemp", errno.EROFS),
     (tempfile, "mkstemp", errno.EACCES), (os, "fsync", errno.EDQUOT)],
)  # fmt: skip
def test_a_full_or_read_only_disk_is_one_warning_and_leaves_no_litter(
    store, path, monkeypatch, owner, name, code
):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.warns(RuntimeWarning, match=os.strerror(code)):
            assert not store.write(OTHER, make_plan())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not store.write(OTHER, make_plan())
        assert os.listdir(store.directory) == [path.name]
        assert store.read(DIGEST) == make_plan()
    assert store.write(OTHER, make_plan("space again"))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory_still_serves_what_it_holds(store, path):
    store.directory.chmod(0o500)
    try:
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert not store.write(OTHER, make_plan())
        assert store.read(DIGEST) == make_plan()
    finally:
        store.directory.chmod(0o700)


def test_an_interrupted_write_keeps_the_old_plan_and_leaves_no_litter(store, path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.write(DIGEST, make_plan("later"))
    assert os.listdir(store.directory) == [path.name]
    assert store.read(DIGEST) == make_plan()
