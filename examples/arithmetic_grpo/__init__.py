"""GRPO on arithmetic, from nothing: the parts of ``examples/grpo.py``, one idea a file.

    task ← warmup, rollout ← objective ← loop ← speed, report ← command

``task`` makes problems and judges answers; ``models`` builds or loads the model; ``warmup`` is
supervised; ``rollout`` samples from the engine; ``objective`` is GRPO's arithmetic; ``loop`` puts
them together; ``speed`` times rollouts against transformers; ``report`` draws what happened;
``ranks`` is what several processes need.
"""
