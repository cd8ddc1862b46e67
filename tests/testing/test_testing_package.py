"""The public package as users meet it: its documentation, and what it says where it cannot run."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from test_layout import ROOT

import hybrid_fx.testing


def test_the_documented_test_of_a_pass_runs() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", words, flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_every_public_name_is_there_and_documented() -> None:
    for name in hybrid_fx.testing.__all__:
        assert getattr(hybrid_fx.testing, name).__doc__


def test_without_hypothesis_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import hybrid_fx.testing"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError")
    assert "pip install 'hybrid_fx[test]'" in last
