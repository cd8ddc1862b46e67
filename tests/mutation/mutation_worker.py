"""Runs tests in forks of one warm interpreter, in the root of a copy of the tree.

The arguments are the modules that are imported once for all forks.

Reads ``{"tests", "limit", "times"}`` by line and answers ``{"code", "test", "why", "seconds",
"times"}``: the first failure, and the seconds each test took. Of one file, tests that took less
come first, so that the first failure comes soon. The interpreter holds the foreign packages only;
each fork imports what is to be tested anew, so that a fault put into the tree is seen.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """Notes the first failure of a run and how long each test takes; puts quick tests first."""

    def __init__(self, known: dict[str, float]) -> None:
        self.test = self.why = ""
        self.times: dict[str, float] = {}
        self._known = known

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """By file as given, and by the time that was known within a file."""
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda i: (files.index(i.path), self._known.get(i.nodeid, 0.0)))

    def _note(self, report: Any) -> None:
        seconds = getattr(report, "duration", 0.0)
        self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + seconds
        if report.failed and not self.test:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr).strip().split("\n")[-1]
            self.test, self.why = report.nodeid, text.strip().split("\n")[0]

    pytest_runtest_logreport = pytest_collectreport = _note


def run_here(tests: list[str], known: dict[str, float], answer: Path) -> None:
    """pytest in this process; what came out is written to ``answer``."""
    recorder = Recorder(known)
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            args = ["-x", "-q", "-p", "no:cacheprovider", *tests]
            code = int(pytest.main(args, plugins=[recorder]))
    said = {"code": code, "test": recorder.test, "why": recorder.why, "times": recorder.times}
    answer.write_text(json.dumps(said))


def run_forked(tests: list[str], limit: float, known: dict[str, float]) -> dict[str, Any]:
    """:func:`run_here` in a fork that is ended after ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        answer, start = Path(folder) / "answer", time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            try:
                run_here(tests, known, answer)
            finally:
                os._exit(0)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() - start > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {
                    "code": 1,
                    "test": f"no end within {limit:.0f} s",
                    "why": "",
                    "seconds": limit,
                }
            time.sleep(0.02)
        seconds = time.monotonic() - start
        if not answer.exists():
            return {"code": 1, "test": "the interpreter died", "why": "", "seconds": seconds}
        return {**json.loads(answer.read_text()), "seconds": seconds}


def main() -> None:
    """Import the foreign packages, say so, then serve one line after the other."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        given = json.loads(line)
        said = run_forked(given["tests"], given["limit"], given["times"])
        print(json.dumps(said), file=out)


if __name__ == "__main__":
    main()
