"""Law 5: the weight version rises whenever weights may have changed, and at no other time."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from hybrid_fx.engine.versions import WeightTracker


class Net(nn.Module):
    """Two linear layers, one tied, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("saved", torch.ones(3))
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.constant = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).sum() + self.saved.sum()


class Halving(torch.optim.Optimizer):
    """A custom optimizer that writes through ``.data``, which no version counter shows."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tracker(net: Net) -> Iterator[WeightTracker]:
    tracker = WeightTracker(net)
    yield tracker
    tracker.close()


def risen(tracker: WeightTracker, change: Callable[[], object]) -> str:
    """Run ``change``; the version must rise by it, and stand still afterwards."""
    before = tracker.refresh()
    change()
    after = tracker.refresh()
    assert after > before
    assert tracker.refresh() == after == tracker.version
    return tracker.reason


def stays(tracker: WeightTracker, action: Callable[[], object]) -> None:
    before = tracker.refresh()
    action()
    assert tracker.refresh() == before


# Nothing changed, or by hand ----------------------------------------------------------------


@pytest.mark.parametrize("verify", ["off", "checksum"])
def test_nothing_changed_leaves_the_version(net: Net, verify: str) -> None:
    tracker = WeightTracker(net, verify=verify)
    assert [tracker.refresh() for _ in range(20)] == [0] * 20
    assert tracker.reason == ""
    with torch.no_grad():
        net(torch.ones(1, 4))
    net.eval()
    net.first.weight.requires_grad_(False)
    assert tracker.refresh() == 0
    tracker.close()


def test_mark_raises_by_hand(tracker: WeightTracker) -> None:
    assert "by hand" in risen(tracker, lambda: tracker.mark("by hand"))


def test_an_unknown_way_to_verify_is_refused(net: Net) -> None:
    with pytest.raises(ValueError, match="'off' or 'checksum'"):
        WeightTracker(net, verify="always")  # type: ignore[arg-type]


# Optimizers ---------------------------------------------------------------------------------


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


def test_an_edit_after_the_raised_version_was_read_raises_it_again(
    net: Net, tracker: WeightTracker
) -> None:
    tracker.mark("training forward")
    told = tracker.version
    with torch.no_grad():
        net.saved.zero_()
    assert tracker.refresh() > told


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


# The hook -----------------------------------------------------------------------------------


def test_close_removes_the_global_hook(net: Net) -> None:
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = list(hooks)
    tracker = WeightTracker(net)
    assert len(hooks) == len(before) + 1
    tracker.close()
    tracker.close()
    assert list(hooks) == before
    risen(tracker, lambda: tracker.mark("still of use"))


def test_a_dropped_tracker_leaves_no_hook_and_no_model_behind() -> None:
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = list(hooks)
    net = Net()
    tracker = WeightTracker(net)
    gone = weakref.ref(tracker), weakref.ref(net)
    del tracker, net
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert list(hooks) == before


def test_old_weights_are_not_kept_alive(net: Net, tracker: WeightTracker) -> None:
    old = weakref.ref(net.second.bias)
    net.second.bias = nn.Parameter(torch.zeros(4))
    gc.collect()
    assert old() is None
    assert tracker.refresh() == 1


def test_copies_and_pickles_are_those_of_a_plain_model(net: Net, tracker: WeightTracker) -> None:
    plain = Net()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.__dict__.keys() == plain.__dict__.keys()
        assert not twin._load_state_dict_post_hooks
        stays(tracker, lambda twin=twin: twin.load_state_dict(plain.state_dict()))
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, fused=True)
        twin(torch.ones(1, 4)).backward()
        stays(tracker, optimizer.step)


# load_state_dict needs no hook: it copies in place, or assigns --------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["whole", "submodule"])
def test_load_state_dict_raises_the_version(
    net: Net, tracker: WeightTracker, part: str, assign: bool
) -> None:
    target = net if part == "whole" else net.first
    state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    risen(tracker, lambda: target.load_state_dict(state, assign=assign))


# In-place edits -----------------------------------------------------------------------------


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


# Other objects, memory, shapes ----------------------------------------------------------------


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


# What no counter shows ------------------------------------------------------------------------


def through_data(net: Net) -> None:
    net.first.weight.data[2, 1] += 1


def through_numpy(net: Net) -> None:
    net.first.weight.detach().numpy()[2, 1] += 1


def permuted(net: Net) -> None:
    net.first.weight.data.copy_(net.first.weight.data.flip(0).clone())


def scratch_buffer(net: Net) -> None:
    net.scratch.data[0] = -1.0


@pytest.mark.parametrize("write", [through_data, through_numpy, permuted, scratch_buffer])
def test_a_hidden_write_is_seen_by_the_checksum_and_only_by_it(
    net: Net, write: Callable[[Net], None]
) -> None:
    blind, reading = WeightTracker(net), WeightTracker(net, verify="checksum")
    stays(blind, lambda: write(net))
    assert reading.refresh() == 1
    assert "checksum" in reading.reason
    assert reading.refresh() == 1
    blind.close()
    reading.close()


def test_tensors_of_inference_mode_are_read_in_either_mode(net: Net) -> None:
    with torch.inference_mode():
        net.saved = torch.ones(3)
    tracker = WeightTracker(net)
    assert tracker.refresh() == 0

    def edit() -> None:
        with torch.inference_mode():
            net.saved[1] = 5

    assert "saved: checksum" in risen(tracker, edit)
    tracker.close()


def test_tensors_without_storage_are_looked_at(net: Net) -> None:
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    for verify in ("off", "checksum"):
        tracker = WeightTracker(net, verify=verify)  # type: ignore[arg-type]
        assert tracker.refresh() == 0
        risen(tracker, lambda: setattr(net, "sparse", torch.eye(3).to_sparse()))
        tracker.close()


def test_a_tensor_subclass_is_looked_at_inside(net: Net) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    net.register_buffer("pair", TwoTensor(torch.zeros(2), torch.zeros(2)))
    tracker = WeightTracker(net, verify="checksum")
    assert tracker.refresh() == 0

    def write() -> None:
        net.pair.b.data[1] = 3

    assert "pair.b: checksum" in risen(tracker, write)
    tracker.close()


# Cost -----------------------------------------------------------------------------------------


def test_a_refresh_costs_little() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(200)))
    tracker = WeightTracker(model)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        tracker.refresh()
        seconds.append(time.perf_counter() - start)
    tracker.close()
    # About 2 ms for 600 modules; ten times that on a machine that others use too.
    assert min(seconds) < 0.02
