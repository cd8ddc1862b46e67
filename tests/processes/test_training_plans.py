"""A second process trains on the plan that the first one stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from processes import training_process


def test_a_second_process_trains_without_tracing(tmp_path: Path) -> None:
    first = training_process.train_once(str(tmp_path))
    script = Path(training_process.__file__)
    paths = [str(script.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout.strip().splitlines()[-1])
    assert first["counters"]["captures"] == 1
    assert second["counters"]["captures"] == 0
    assert second["counters"]["cache_hits_disk"] == 1
    for row in (first, second):
        assert row["counters"]["train_graph_calls"] == 1
        assert row["fallbacks"] == {}
    assert (second["loss"], second["slope"]) == (first["loss"], first["slope"])
