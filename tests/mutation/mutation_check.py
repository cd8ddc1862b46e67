"""Run mutants on copies of a tree, several at once, and say which test notices each."""

from __future__ import annotations

import compileall
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

from mutant import Mutant, mutated, stale

WORKER = Path(__file__).resolve().parent / "mutation_worker.py"
#: Foreign packages that every fork would import: one import serves them all.
WARM = ("hypothesis", "torch._dynamo", "transformers.modeling_utils", "peft")
#: Of the tree, what tests need.
COPIED = ("hybrid_fx", "passes", "tests", "examples", "benchmarks")
#: Seconds for the tests of one mutant; one that never ends is noticed by that.
LIMIT = 300.0

_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "results", "passes")


class CheckError(RuntimeError):
    """The check itself cannot run; nothing is said about any mutant."""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: ``killed``, ``survived``, ``equivalent``, or ``broken``.

    ``test`` is the first that failed and ``why`` the first line of what it said.
    """

    mutant: Mutant
    verdict: str
    test: str
    why: str
    seconds: float


def copy_tree(root: Path, target: Path) -> None:
    """What the tests need of ``root``, put together as it is installed."""
    target.mkdir(parents=True)
    for name in COPIED:
        if (root / name).is_dir():
            ignore = _NOT_COPIED if name == "hybrid_fx" else shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / name, target / name, ignore=ignore)
    for file in root.iterdir():
        if file.is_file():
            shutil.copy2(file, target / file.name)
    if (target / "passes").is_dir():
        (target / "hybrid_fx" / "passes").symlink_to(target / "passes", target_is_directory=True)
    # By content: a file that is changed twice within a second would be taken for its first form.
    mode = PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(target, quiet=2, invalidation_mode=mode)


class Worker:
    """One copy of the tree and one interpreter that runs tests on it."""

    def __init__(self, root: Path, copy: Path, warm: Sequence[str]) -> None:
        copy_tree(root, copy)
        self.copy = copy
        path = os.pathsep.join((str(copy), str(copy / "tests")))
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *warm],
            cwd=copy,
            # CI: hypothesis draws the same examples each time.
            env={**os.environ, "PYTHONPATH": path, "CI": "true", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CheckError(f"the worker in {self.copy} ended; its messages stand above")
        return json.loads(line)

    def test(self, tests: Sequence[str], times: Mapping[str, float]) -> dict[str, Any]:
        """Run ``tests`` up to the first failure, for :data:`LIMIT` seconds at most.

        Args:
            times: Seconds that tests took before, by their ids.
        """
        files = {test.partition("::")[0] for test in tests}
        known = {name: s for name, s in times.items() if name.partition("::")[0] in files}
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"tests": list(tests), "limit": LIMIT, "times": known}) + "\n"
        )
        self._process.stdin.flush()
        return dict(self._answer())

    def judge(self, mutant: Mutant, times: Mapping[str, float]) -> Outcome:
        """Put the fault in, run the tests, take it out."""
        file = self.copy / mutant.file
        before = file.read_text()
        file.write_text(mutated(mutant, before))
        try:
            said = self.test(mutant.tests, times)
        finally:
            file.write_text(before)
        verdict = {0: "survived", 1: "killed"}.get(said["code"], "broken")
        if mutant.fault.equivalent:
            # What a test does notice is not equivalent: the reason given is wrong.
            verdict = {"survived": "equivalent", "killed": "broken"}.get(verdict, verdict)
        return Outcome(mutant, verdict, said["test"], said["why"], said["seconds"])

    def close(self) -> None:
        """End the interpreter."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def workers(root: Path, count: int, warm: Sequence[str] = WARM) -> Iterator[list[Worker]]:
    """Workers on copies in a temporary folder, which goes with them."""
    with tempfile.TemporaryDirectory(prefix="hybrid_fx_mutants_") as folder:
        made = [Worker(root, Path(folder) / f"copy{i}", warm) for i in range(count)]
        try:
            yield made
        finally:
            for worker in made:
                worker.close()


def spread(made: Sequence[Worker], jobs: Sequence[Any], run: Callable[[Worker, Any], None]) -> None:
    """Give each job to the next free worker; the first error ends all."""
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    errors: list[BaseException] = []

    def serve(worker: Worker) -> None:
        while not errors:
            try:
                run(worker, todo.get_nowait())
            except queue.Empty:
                return
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check(
    root: Path,
    mutants: Sequence[Mutant],
    made: Sequence[Worker],
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcome of every mutant, in order; ``told`` hears of each as it comes.

    Raises:
        CheckError: where a mutant does not fit the source, or the tree as it is fails a test.
    """
    if found := list(stale(mutants, root)):
        raise CheckError("\n".join(found))
    failed: list[str] = []
    times: dict[str, float] = {}

    def as_it_is(worker: Worker, test: str) -> None:
        said = worker.test([test], {})
        times.update(said.get("times", {}))
        if said["code"] != 0:
            failed.append(f"{test}: {said['test']} {said['why']}")

    spread(made, list(dict.fromkeys(t for mutant in mutants for t in mutant.tests)), as_it_is)
    if failed:
        raise CheckError("tests fail without any mutant:\n" + "\n".join(failed))
    outcomes: dict[Mutant, Outcome] = {}

    def judge(worker: Worker, mutant: Mutant) -> None:
        outcomes[mutant] = outcome = worker.judge(mutant, times)
        told(outcome)

    spread(made, mutants, judge)
    return [outcomes[mutant] for mutant in mutants]
