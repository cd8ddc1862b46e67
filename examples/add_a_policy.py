"""A policy of your own: ``python examples/add_a_policy.py``.

GPT-NeoX has LayerNorm, one weight for query, key and value, and a plain MLP that runs beside
attention. No policy of the library has these names, so its layers generate from the captured graph
as it is: right, but without fusions. A policy is data that says where things are.
"""

from __future__ import annotations

import torch
import transformers

import hybrid_fx
from hybrid_fx.passes import Policy, Role
from hybrid_fx.passes.policies.patterns import LAYER_NORM, OUTPUT, linear, plain_mlp

# A role is a name that passes know, a pattern, and the submodules of a layer in which it stands.
GPT_NEOX = Policy(
    name="gpt_neox",
    roles=(
        Role(
            name="norm",
            pattern=LAYER_NORM,
            at=("input_layernorm", "post_attention_layernorm"),
            count=2,
        ),
        Role(name="qkv", pattern=linear(biased=True), at=("attention.query_key_value",)),
        Role(name="output", pattern=OUTPUT, at=("attention.dense",)),
        Role(name="up", pattern=linear(), at=("mlp.dense_h_to_4h",)),
        Role(name="mlp", pattern=plain_mlp("gelu"), at=("mlp",)),
    ),
)


def tiny_gpt_neox() -> transformers.GPTNeoXForCausalLM:
    """GPT-NeoX with random weights."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_parallel_residual=False,
        pad_token_id=0,
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def main() -> dict[str, object]:
    model = tiny_gpt_neox()
    ids = torch.randint(3, 64, (2, 7))
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    found: dict[str, object] = {}
    for title, policies in (("without", ()), ("with", (GPT_NEOX,))):
        engine = hybrid_fx.hybridize(model, policies=policies, fusions="all", disk_cache=False)
        tokens = engine.generate(ids, max_new_tokens=12, do_sample=False)
        report = engine.explain()
        print(f"{title} the policy: {report.matched} of {report.total} layers rewritten")
        for layer in report.layers[:1]:
            print(f"  {layer.path}: policy {layer.policy}, fused {', '.join(layer.fused) or '-'}")
            for missed in layer.missed[:3]:
                print(f"    {missed}")
            if len(layer.missed) > 3:
                print(f"    and {len(layer.missed) - 3} more")
        same = bool(torch.equal(tokens, wanted))
        print(f"  tokens equal to transformers': {same}\n")
        found[title] = (report.matched, report.layers[0].fused, same)
        engine.close()
    return found


if __name__ == "__main__":
    main()
