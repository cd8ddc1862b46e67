"""Law 5: where nothing changed the weight version stands still; a tracker leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from call_counts import calls_of
from engine.versioned_net import Net, risen, stays
from torch import nn
from torch.optim import optimizer as torch_optimizer

from hybrid_fx.engine.versions import WeightTracker


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
    gc.collect()  # what earlier tests dropped
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


def test_a_refresh_costs_little() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(200)))
    tracker = WeightTracker(model)
    tracker.refresh()
    # About 70 calls a parameter, which take 2 ms for 400 of them.
    assert calls_of(tracker.refresh) < 100 * len(list(model.parameters()))
    tracker.close()
