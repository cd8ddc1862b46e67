"""Law 5: what no version counter shows, the checksum does, in tensors of any kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.versioned_net import Net, risen, stays

from hybrid_fx.engine.versions import WeightTracker


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
