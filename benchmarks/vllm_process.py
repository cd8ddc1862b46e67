"""vLLM as a process that answers lines of JSON; runs in an environment of its own.

    python benchmarks/vllm_process.py '{"model": "FOLDER", "dtype": "bfloat16", "positions": 512}'

The first line it writes says that it is ready. A request has ``prompts`` (lists of ids),
``lengths`` (new tokens of each) and ``sample``; the answer has the seconds and the tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def answer(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Generate, from a prefix cache that is empty as after new weights."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    temperature = 1.0 if request["sample"] else 0.0
    settings = [
        SamplingParams(
            temperature=temperature, max_tokens=length, ignore_eos=True, detokenize=False
        )
        for length in request["lengths"]
    ]
    llm.reset_prefix_cache()
    start = time.perf_counter()
    done = llm.generate(prompts, settings, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": [list(each.outputs[0].token_ids) for each in done]}


def main() -> None:
    given = json.loads(sys.argv[1])
    # Its logs go to standard output too: keep that for the answers alone.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm

    llm = vllm.LLM(
        model=given["model"],
        dtype=given["dtype"],
        max_model_len=given["positions"],
        skip_tokenizer_init=True,
        seed=0,
    )
    print(json.dumps({"ready": vllm.__version__}), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(llm, json.loads(line))), file=replies)


if __name__ == "__main__":
    main()
