"""Law 5: a step of any optimizer on the model's weights raises the weight version, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.versioned_net import Net, risen, stays
from torch import Tensor, nn

from hybrid_fx.engine.versions import WeightTracker


class Halving(torch.optim.Optimizer):
    """A custom optimizer that writes through ``.data``, which no version counter shows."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def optimizers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p),
        "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
        "adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
        "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
        "custom": Halving,
    }


@pytest.mark.parametrize("name", optimizers())
def test_an_optimizer_step_raises_the_version(net: Net, tracker: WeightTracker, name: str) -> None:
    optimizer = optimizers()[name](list(net.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 4)).square()
        loss.backward()
        return loss

    closure()
    before = net.first.weight.detach().clone()
    reason = risen(
        tracker, lambda: optimizer.step(closure) if name == "lbfgs" else optimizer.step()
    )
    assert type(optimizer).__name__ in reason
    assert not torch.equal(net.first.weight, before)


def test_a_compiled_step_raises_the_version(net: Net, tracker: WeightTracker) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, 4)).backward()
    step = torch.compile(optimizer.step, backend="eager")
    risen(tracker, step)
    # The graph is cached now: the second step runs no Python of the optimizer.
    risen(tracker, step)


def test_one_step_raises_the_version_once(net: Net, tracker: WeightTracker) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, 4)).backward()
    optimizer.step()
    assert tracker.refresh() == 1
    assert tracker.reason == "SGD.step()"


def test_an_optimizer_of_another_model_leaves_the_version(tracker: WeightTracker) -> None:
    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, fused=True)
    other(torch.ones(1, 4)).backward()
    stays(tracker, optimizer.step)


def test_on_step_is_called_for_steps_on_the_model_only(net: Net, tracker: WeightTracker) -> None:
    called: list[int] = []
    tracker.on_step = lambda: called.append(tracker.version)
    other = Net()
    for model in (other, net, net):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(1, 4)).backward()
        optimizer.step()
    assert called == [1, 2]


def test_an_optimizer_of_some_parameters_raises_the_version(
    net: Net, tracker: WeightTracker
) -> None:
    optimizer = torch.optim.SGD([net.second.bias], lr=0.1, fused=True)
    net(torch.ones(1, 4)).backward()
    risen(tracker, optimizer.step)


def test_an_optimizer_over_the_memory_of_a_parameter_raises_the_version(
    net: Net, tracker: WeightTracker
) -> None:
    flat = nn.Parameter(net.first.weight.data.view(-1))
    flat.grad = torch.ones_like(flat)
    optimizer = torch.optim.SGD([flat], lr=0.1, fused=True)
    risen(tracker, optimizer.step)


def test_two_trackers_of_one_model_count_apart(net: Net) -> None:
    one, two = WeightTracker(net), WeightTracker(net)
    one.mark("only one")
    with torch.no_grad():
        net.saved.add_(1)
    assert two.refresh() == 1
    assert one.refresh() == 1  # the edit belongs to the mark that nobody was told of
    one.close()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    net(torch.ones(1, 4)).backward()
    optimizer.step()
    assert (one.refresh(), two.refresh()) == (1, 2)
    two.close()
