"""The backend is found by its name in an installed copy, by a process that never imports it."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from hybrid_fx.backend import hybrid_fx

ROOT = Path(__file__).resolve().parents[2]

_PROGRAM = """
import sys, torch
from torch import nn

def ours():
    return [name for name in sys.modules if name.partition(".")[0] == "hybrid_fx"]

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))

assert "hybrid_fx" in torch._dynamo.list_backends()
assert not ours(), "listed without being imported"
model, reports = Mlp(), []
fast = torch.compile(model, backend="hybrid_fx", options={"report": reports.append})
with torch.no_grad():
    assert torch.equal(fast(torch.ones(2, 4)), model(torch.ones(2, 4)))
assert reports[0].passes["fuse_mlp"] == 1
import hybrid_fx.backend
torch.compile(model, backend=hybrid_fx.backend.hybrid_fx)(torch.ones(2, 4))
heavy = [name for name in ("transformers", "peft", "deepspeed", "trl") if name in sys.modules]
print(hybrid_fx.__file__, heavy)
"""


def _copy(target: Path) -> None:
    for name in ("hybrid_fx", "passes"):
        skipped = shutil.ignore_patterns("__pycache__", "passes" if name == "hybrid_fx" else "")
        shutil.copytree(ROOT / name, target / name, ignore=skipped)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as an installer lays it out: entry points word for word."""
    site = tmp_path_factory.mktemp("site")
    _copy(site)
    (site / "passes").rename(site / "hybrid_fx" / "passes")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    folder = site / f"hybrid_fx-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: hybrid_fx\nVersion: {version}\n"
    )
    groups = config["options.entry_points"].items()
    text = "".join(f"[{group}]{entries}\n" for group, entries in groups)
    (folder / "entry_points.txt").write_text(text)
    return site


def test_the_metadata_names_the_backend(installed: Path) -> None:
    (distribution,) = distributions(path=[str(installed)], name="hybrid_fx")
    (found,) = distribution.entry_points.select(group="torch_dynamo_backends")
    assert found.name == "hybrid_fx"
    assert found.load() is hybrid_fx


@pytest.mark.deep
def test_pip_installs_that_metadata(tmp_path: Path) -> None:
    from importlib.metadata import version

    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building offline needs setuptools 77 in the environment, as pyproject says")
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _copy(source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    options = ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run(
        [*pip, *options, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (distribution,) = distributions(path=[str(target)], name="hybrid_fx")
    (found,) = distribution.entry_points.select(group="torch_dynamo_backends")
    assert (found.name, found.value) == ("hybrid_fx", "hybrid_fx.backend:hybrid_fx")


def test_torch_finds_it_by_name_without_an_import_of_ours(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        cwd=installed,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "hybrid_fx" / "__init__.py"), "[]"]
