"""Laws 1, 2, 5 and 6 together: any order of training, generating, loading, copying and closing.

A plain twin goes through the same steps without an engine. After each generate the tokens and the
random state are the twin's; at the end so is every bit of weights and optimizer.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from laws.against_hf import assert_bit_identical, hf_generate, near_ties, tensors_of
from tiny_models import VOCAB, adapted, prompt, randomize_adapters, tiny

import hybrid_fx

SEEDS = st.integers(0, 50)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=3)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
}


def plain_model() -> Any:
    return tiny("gpt2", layers=1)  # dropout 0.1 while it trains


def lora_model() -> Any:
    model = adapted(tiny("llama", layers=1), target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    randomize_adapters(model, 2)
    return model.eval()


class Machine(RuleBasedStateMachine):
    """``pairs`` holds model and twin of one kind; each rule does the same to both."""

    @initialize(
        lora=st.booleans(),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        release=st.booleans(),
        mode=st.sampled_from(["auto", "fold"]),
    )
    def begin(self, lora: bool, optimizer: str, release: bool, mode: str) -> None:
        self.lora = lora
        self.options = {"release_inference_cache": release, "lora": mode}
        self.model = lora_model() if lora else plain_model()
        self.twin = copy.deepcopy(self.model)
        self.trained = [
            OPTIMIZERS[optimizer]([p for p in m.parameters() if p.requires_grad])
            for m in (self.model, self.twin)
        ]
        self.engine = hybrid_fx.hybridize(self.model, **self.options)
        self.saved: Any = None

    def both(self, change: Any) -> None:
        for model in (self.model, self.twin):
            change(model)

    @rule()
    def eval(self) -> None:
        self.engine.eval()
        self.twin.eval()

    @rule()
    def train(self) -> None:
        self.engine.train()
        self.twin.train()

    @rule(seed=SEEDS)
    def step(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCAB, (2, 4), generator=rng)
        for run, model, optimizer in zip(
            (self.engine, self.twin), (self.model, self.twin), self.trained, strict=True
        ):
            if not any(p.requires_grad for p in model.parameters()):
                return
            torch.manual_seed(seed)
            optimizer.zero_grad()
            run(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    @rule(lengths=LENGTHS, seed=SEEDS, sample=st.booleans(), by_model=st.booleans())
    def generate(self, lengths: list[int], seed: int, sample: bool, by_model: bool) -> None:
        call = prompt(lengths, seed) | {"max_new_tokens": 4, "do_sample": sample}
        flags = [module.training for module in self.model.modules()]
        torch.manual_seed(seed)
        got = (self.model if by_model else self.engine).generate(**call)
        state = torch.get_rng_state()
        assert [module.training for module in self.model.modules()] == flags
        # HF leaves dropout on in training; ours never does.
        twin_flags = {module: module.training for module in self.twin.modules()}
        self.twin.eval()
        torch.manual_seed(seed)
        wanted = hf_generate(self.twin, **call)
        assert torch.equal(torch.get_rng_state(), state)
        if sample:
            assert got.tolist() == wanted.tolist()
        else:
            near_ties(self.twin, call, got, wanted)
        for module, flag in twin_flags.items():
            module.training = flag

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy(self.model.state_dict())
        assert_bit_identical(self.saved, self.twin.state_dict())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        self.both(lambda model: model.load_state_dict(self.saved))

    @precondition(lambda self: self.lora)
    @rule(name=st.sampled_from(["default", "other"]))
    def switch_adapter(self, name: str) -> None:
        self.both(lambda model: model.set_adapter(name))

    @precondition(lambda self: self.lora)
    @rule(seed=SEEDS)
    def generate_without_adapter(self, seed: int) -> None:
        call = prompt((3, 1), seed) | {"max_new_tokens": 3}
        self.twin.eval()
        self.engine.eval()
        with self.model.disable_adapter(), self.twin.disable_adapter():
            assert self.engine.generate(**call).tolist() == hf_generate(self.twin, **call).tolist()

    @precondition(lambda self: self.lora)
    @rule()
    def merge_and_unmerge(self) -> None:
        self.both(lambda model: model.merge_adapter())
        self.generate([2, 1], 0, sample=False, by_model=False)
        self.both(lambda model: model.unmerge_adapter())

    @rule()
    def write_in_place(self) -> None:
        def change(model: Any) -> None:
            with torch.no_grad():
                next(p for p in model.parameters() if p.dim() == 2).mul_(0.9)

        self.both(change)

    @rule(seed=SEEDS)
    def deepcopy(self, seed: int) -> None:
        call = prompt((2, 3), seed) | {"max_new_tokens": 3}
        copied = copy.deepcopy(self.model).eval()
        assert_bit_identical(tensors_of(copied), tensors_of(self.twin))
        calls = self.engine.stats.counters["generate_calls"]
        got = copied.generate(**call).tolist()
        assert self.engine.stats.counters["generate_calls"] == calls
        assert got == hf_generate(copied, **call).tolist()

    @rule()
    def save_pretrained(self) -> None:
        written = []
        for model in (self.engine, self.twin):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                files = sorted(Path(folder).rglob("*.safetensors"))
                written.append({str(f.relative_to(folder)): f.read_bytes() for f in files})
        assert written[0] == written[1]
        assert written[0]

    @rule()
    def close_and_hybridize(self) -> None:
        self.engine.close()
        assert "generate" not in vars(self.model)
        with pytest.raises(hybrid_fx.EngineClosedError):
            self.engine.generate(input_ids=torch.tensor([[1]]))
        self.engine = hybrid_fx.hybridize(self.model, **self.options)

    @invariant()
    def same_flags(self) -> None:
        if hasattr(self, "engine"):
            flags = [[m.training for m in model.modules()] for model in (self.model, self.twin)]
            assert flags[0] == flags[1]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.engine.stats.counters["hf_forwards"] == 0
        assert not self.engine.stats.fallbacks
        self.engine.close()
        assert_bit_identical(tensors_of(self.model), tensors_of(self.twin))
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in self.trained)
        assert list(ours) == list(theirs)
        for index, state in theirs.items():
            assert_bit_identical(ours[index], state)


class DeepMachine(Machine):
    """The same, under the profile that the environment chose."""


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)

TestAnyOrderDeep = pytest.mark.deep(DeepMachine.TestCase)
