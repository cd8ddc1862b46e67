"""Law 5: edits in place and other tensors, memory or shapes raise the weight version."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.versioned_net import Net, risen
from torch import nn

from hybrid_fx.engine.versions import WeightTracker


def test_an_edit_after_the_raised_version_was_read_raises_it_again(
    net: Net, tracker: WeightTracker
) -> None:
    tracker.mark("training forward")
    told = tracker.version
    with torch.no_grad():
        net.saved.zero_()
    assert tracker.refresh() > told


# No hook is needed: load_state_dict copies in place, or assigns.
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["whole", "submodule"])
def test_load_state_dict_raises_the_version(
    net: Net, tracker: WeightTracker, part: str, assign: bool
) -> None:
    target = net if part == "whole" else net.first
    state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    risen(tracker, lambda: target.load_state_dict(state, assign=assign))


def under_no_grad(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.add_(1)


def under_inference_mode(net: Net) -> None:
    with torch.inference_mode():
        net.first.weight.add_(1)


def through_a_view(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.view(-1)[3:5] = 7


def foreach(net: Net) -> None:
    with torch.no_grad():
        torch._foreach_add_([net.first.weight, net.first.bias], 1.0)


EDITS: dict[str, Callable[[Net], object]] = {
    "no_grad": under_no_grad,
    "inference_mode": under_inference_mode,
    "view": through_a_view,
    "detach": lambda net: net.first.weight.detach().add_(1),
    "foreach": foreach,
    "init": lambda net: nn.init.zeros_(net.second.bias),
    "saved buffer": lambda net: net.saved.add_(1),
    "buffer that is not saved": lambda net: net.scratch.mul_(2),
    "tensor attribute": lambda net: net.constant.mul_(2),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_in_place_raises_the_version(net: Net, tracker: WeightTracker, name: str) -> None:
    assert "_version" in risen(tracker, lambda: EDITS[name](net))


def swap_data_twice(net: Net) -> None:
    # The second tensor often gets the memory of the first weight: same pointer, same version.
    net.first.weight.data = torch.zeros(4, 4)
    net.first.weight.data = torch.ones(4, 4)


def untie(net: Net) -> None:
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())


def swap_tensors(net: Net) -> None:
    torch.utils.swap_tensors(net.first.bias, nn.Parameter(torch.zeros(4)))


def reshape(net: Net) -> None:
    net.first.weight.data = net.first.weight.data.t()


def same_memory(net: Net) -> None:
    net.first.bias = nn.Parameter(net.first.bias.detach())


REPLACED: dict[str, Callable[[Net], object]] = {
    "to a dtype": lambda net: net.to(torch.bfloat16),
    "to a device": lambda net: net.to("meta"),
    "two .data assignments": swap_data_twice,
    "transposed .data": reshape,
    "another parameter over the same memory": same_memory,
    "untied": untie,
    "tensors swapped": swap_tensors,
    "a module replaced": lambda net: setattr(net, "first", nn.Linear(4, 4)),
    "a module added": lambda net: net.add_module("third", nn.Linear(2, 2)),
    "a module removed": lambda net: delattr(net, "first"),
    "a buffer replaced": lambda net: setattr(net, "saved", torch.ones(3)),
    "a parameter to None": lambda net: setattr(net.first, "bias", None),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_tensor_raises_the_version(net: Net, tracker: WeightTracker, name: str) -> None:
    assert risen(tracker, lambda: REPLACED[name](net))


def test_data_assignments_that_return_the_pointer_are_all_seen() -> None:
    layer = nn.Linear(300, 300)
    tracker, weight, same_pointer = WeightTracker(layer), layer.weight, 0
    for number in range(90):
        size = (300, 100, 30)[number % 3]  # whether memory comes back depends on its size
        weight.data = torch.ones(size, size)
        pointer, version = weight.data_ptr(), weight._version
        before = tracker.refresh()
        weight.data = torch.empty(0)  # frees the memory,
        weight.data = torch.ones(size, size)  # which is given out again
        same_pointer += (weight.data_ptr(), weight._version) == (pointer, version)
        assert tracker.refresh() == before + 1
    assert same_pointer > 0, "no pointer came back: the test shows nothing"
    tracker.close()


def test_the_reason_names_the_tensor_and_the_change(net: Net, tracker: WeightTracker) -> None:
    assert risen(tracker, lambda: net.saved.add_(1)) == "saved: _version changed 0 -> 1"
    assert "first.bias" in risen(tracker, lambda: setattr(net.first, "bias", None))
