"""Run the same models in a fresh interpreter: ``python fresh_process.py JSON`` prints a JSON line.

The argument is ``{"cache_dir", "cases", "may_trace", "options"}``; see :func:`run_cases`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent

#: Case -> (kind, LoRA, dtype). The factors of "side" are so small that folding rounds them away.
CASES = {
    "llama": ("llama", None, "float32"),
    "gpt2": ("gpt2", None, "float32"),
    "fold": ("llama", 0.1, "float32"),
    "side": ("llama", 1e-4, "bfloat16"),
}

FAILING = "jamba"
"""A case that does not capture."""


def model_of(case: str) -> Any:
    import torch
    from tiny_models import adapted, randomize_adapters, tiny

    if case == FAILING:
        from capture.failing_models import tiny_jamba

        return tiny_jamba()
    kind, lora, dtype = CASES[case]
    model = tiny(kind)
    if lora is not None:
        model = adapted(model)
        randomize_adapters(model, 3, lora)
    return model.to(getattr(torch, dtype)).eval()


def run_case(case: str, cache_dir: str, **options: Any) -> dict[str, Any]:
    """Generate from one engine of one case; its tokens, its counters and what it warned of."""
    from tiny_models import prompt

    import hybrid_fx

    engine = hybrid_fx.hybridize(model_of(case), cache_dir=cache_dir, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = engine.generate(**prompt((5, 3)), max_new_tokens=8, do_sample=False)
    return {
        "tokens": tokens.tolist(),
        "counters": dict(engine.stats.counters),
        "fallbacks": dict(engine.stats.fallbacks),
        "lora": {row.path: row.choice for row in engine.explain().lora},
        "warnings": [str(w.message) for w in caught if "hybrid_fx" in str(w.message)],
    }


def run_cases(
    cases: Sequence[str], cache_dir: str, may_trace: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """:func:`run_case` by case. Without ``may_trace``, the way to Dynamo raises."""
    import torch

    if not may_trace:

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("this process must not trace")

        torch.compile = refuse
    return {case: run_case(case, cache_dir, **options) for case in cases}


def start(
    cases: Sequence[str],
    cache_dir: Path,
    *,
    may_trace: bool = True,
    package: Path | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Begin a fresh interpreter on ``cases``; ``package`` holds a copy of hybrid_fx to import."""
    paths = [str(package)] if package else []
    paths += [str(TESTS), os.environ.get("PYTHONPATH", "")]
    asked = {"cases": cases, "cache_dir": str(cache_dir), "may_trace": may_trace}
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(asked | {"options": options})],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def plans_in(folder: Path) -> list[Path]:
    """The files of plans; beside them lies what was measured on the machine."""
    return [file for file in folder.iterdir() if not file.name.startswith("products-")]


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What the child printed last."""
    out, error = child.communicate(timeout=300)
    assert child.returncode == 0, error
    return json.loads(out.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: the tests are found by their package names
    print(json.dumps(run_cases(**json.loads(sys.argv[1]))))
