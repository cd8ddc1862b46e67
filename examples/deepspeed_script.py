"""A policy-gradient loop as it is written for DeepSpeed's HybridEngine, with one call changed.

Two processes, by either launcher; DS_ACCELERATOR=cpu before it uses no GPU:

    deepspeed --num_gpus 2 examples/deepspeed_script.py --zero 3
    torchrun --standalone --nproc_per_node 2 examples/deepspeed_script.py --zero 3

The model is a Llama of random weights over an alphabet of 64 ids. A sample earns the share of even
ids in it, and the model learns to write them.
"""

from __future__ import annotations

import argparse
import os

import deepspeed
import torch
import transformers

import hybrid_fx

PROMPTS, PROMPT, NEW = 16, 8, 16  # rows of a rank, their ids, the ids they grow by


def options() -> argparse.Namespace:
    """The command line; both launchers add what they need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    return parser.parse_args()


def tiny_llama() -> torch.nn.Module:
    """A causal language model; an RLHF script loads its SFT checkpoint here."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def ds_config(stage: int) -> dict[str, object]:
    """The config, its hybrid engine block included, as for DeepSpeed."""
    return {
        "train_micro_batch_size_per_gpu": PROMPTS,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "hybrid_engine": {
            "enabled": True,
            "max_out_tokens": PROMPT + NEW,
            "inference_tp_size": 1,
            "release_inference_cache": False,
            "pin_parameters": True,
            "tp_gather_partition_size": 8,
        },
    }


def loss_of(
    engine: torch.nn.Module, sequences: torch.Tensor, rewards: torch.Tensor
) -> torch.Tensor:
    """REINFORCE: the log-probability of the new ids, weighted by the advantage."""
    logits = engine(input_ids=sequences).logits[:, PROMPT - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1).gather(-1, sequences[:, PROMPT:, None])[..., 0]
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -(logprobs * advantage[:, None]).mean()


def main() -> None:
    """Generate, reward, train."""
    args = options()
    engine, *_ = hybrid_fx.initialize(  # was: deepspeed.initialize
        args=args, model=tiny_llama(), config=ds_config(args.zero)
    )
    rank = deepspeed.comm.get_rank()
    draw = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        prompts = torch.randint(64, (PROMPTS, PROMPT), generator=draw).to(engine.device)
        engine.eval()
        with torch.no_grad():
            sequences = engine.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_length=PROMPT + NEW,
                do_sample=True,
                synced_gpus=True,
            )
        rewards = (sequences[:, PROMPT:] % 2 == 0).float().mean(1)
        engine.train()
        engine.backward(loss_of(engine, sequences, rewards))
        engine.step()
        reward = rewards.mean()
        deepspeed.comm.all_reduce(reward)
        reward /= deepspeed.comm.get_world_size()
        if rank == 0:
            print(f"step {step}: reward {reward:.3f}", flush=True)
    engine.eval()
    if rank == 0:
        print(engine.stats.iterations[-1])
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
