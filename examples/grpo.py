"""GRPO with one model that trains and generates: ``python examples/grpo.py --help``.

A small Llama learns from nothing to add numbers: a supervised warm-up, then GRPO with a verifiable
reward, in minutes on a CPU and without a download. The loop itself is
``arithmetic_grpo/loop.py``; this is all it asks of hybrid_fx::

    engine = hybrid_fx.hybridize(model)
    engine.eval();  ids = engine.generate(**tokens, num_return_sequences=8, do_sample=True)
    engine.train(); logits = engine(**batch).logits; …; loss.backward(); optimizer.step()
"""

from arithmetic_grpo.command import main

if __name__ == "__main__":
    main()
