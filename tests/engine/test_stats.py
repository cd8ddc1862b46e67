"""Claims about the statistics of one engine, on a clock the tests turn by hand."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_fx.engine.iteration import Iteration, readable_bytes
from hybrid_fx.engine.stats import COUNTERS, Stats


class Clock:
    """A clock that stands still until told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> Stats:
    return Stats(clock=clock)


def one_iteration(stats: Stats, clock: Clock) -> None:
    """gather 1, prepare 2, prefill 3, decode 4, rest of generate 5, train 6, others 7 seconds."""
    with stats.timer("generate"):
        clock.pass_(5)
        with stats.timer("prepare"):
            clock.pass_(2)
            with stats.timer("gather"):
                clock.pass_(1)
        with stats.timer("prefill", tokens=30):
            clock.pass_(3)
        with stats.timer("decode") as span:
            for _ in range(4):
                clock.pass_(1)
                span.tokens += 20
    stats.add_samples(14)
    with stats.timer("score"):
        clock.pass_(3)
    clock.pass_(4)
    with stats.timer("train"):
        clock.pass_(6)


def test_an_iteration_runs_from_one_eval_to_the_next(stats: Stats, clock: Clock) -> None:
    assert stats.next_iteration() is None
    one_iteration(stats, clock)
    record = stats.next_iteration()
    assert record is not None
    assert record.e2e_seconds == 28
    assert record.parts == {"gather": 1, "prepare": 2, "generate": 12, "train": 6, "others": 7}
    assert record.samples_per_second == 0.5
    assert record.tokens_per_second("prefill") == 10
    assert record.tokens_per_second("decode") == 20
    assert list(stats.iterations) == [record]


def test_percents_sum_to_the_whole(stats: Stats, clock: Clock) -> None:
    stats.next_iteration()
    one_iteration(stats, clock)
    record = stats.next_iteration()
    assert record is not None
    assert sum(record.percents.values()) == pytest.approx(100)
    assert record.percents["others"] == pytest.approx(25)


def test_time_before_the_first_activity_belongs_to_no_iteration(stats: Stats, clock: Clock) -> None:
    clock.pass_(1000)
    one_iteration(stats, clock)  # a bare generate: nobody called eval()
    record = stats.next_iteration()
    assert record is not None
    assert record.e2e_seconds == 28


def test_the_next_iteration_starts_from_zero(stats: Stats, clock: Clock) -> None:
    stats.next_iteration()
    one_iteration(stats, clock)
    stats.fallback("num_beams=4")
    stats.next_iteration()
    with stats.timer("decode", tokens=7):
        clock.pass_(7)
    stats.add_samples(7)
    second = stats.next_iteration()
    assert second is not None
    assert (second.index, second.e2e_seconds, second.samples) == (1, 7, 7)
    assert dict(second.seconds) == {"decode": 7}
    assert dict(second.tokens) == {"decode": 7}
    assert not second.fallbacks
    assert second.samples_per_second == 1
    assert second.average_samples_per_second == pytest.approx(21 / 35)
    assert stats.seconds["decode"] == 11


def test_eval_twice_in_a_row_closes_nothing(stats: Stats, clock: Clock) -> None:
    stats.next_iteration()
    clock.pass_(2)
    assert stats.next_iteration() is None
    one_iteration(stats, clock)
    record = stats.next_iteration()
    assert record is not None
    assert (record.index, record.e2e_seconds) == (0, 30)


def test_a_timer_of_the_same_name_inside_itself_counts_once(stats: Stats, clock: Clock) -> None:
    with stats.timer("generate"), stats.timer("generate"):
        clock.pass_(3)
    assert stats.seconds == {"generate": 3}


def test_an_exception_inside_a_timer_still_counts_and_closes_it(stats: Stats, clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), stats.timer("generate"):
        with stats.timer("decode") as span:
            clock.pass_(2)
            span.tokens = 5
            raise KeyboardInterrupt
    clock.pass_(100)
    with stats.timer("prefill"):
        clock.pass_(1)
    assert stats.seconds == {"decode": 2, "generate": 0, "prefill": 1}
    assert stats.tokens["decode"] == 5


def test_a_failing_synchronize_leaves_no_timer_open(clock: Clock) -> None:
    calls = iter([None, RuntimeError("the device is gone")])

    def synchronize() -> None:
        if error := next(calls, None):
            raise error

    stats = Stats(clock=clock, synchronize=synchronize)
    with pytest.raises(RuntimeError, match="the device is gone"), stats.timer("decode"):
        clock.pass_(1)
    clock.pass_(10)
    with stats.timer("train"):
        clock.pass_(2)
    assert stats.seconds == {"decode": 1, "train": 2}


def test_queued_work_is_counted_in_the_timer_that_queued_it(clock: Clock) -> None:
    queue = [0.0]

    def synchronize() -> None:
        clock.pass_(queue[0])
        queue[0] = 0.0

    stats = Stats(clock=clock, synchronize=synchronize)
    with stats.timer("prefill"):
        queue[0] = 3.0
    with stats.timer("decode"):
        queue[0] = 5.0
    assert stats.seconds == {"prefill": 3, "decode": 5}


def test_training_is_the_time_from_train_to_the_last_step(stats: Stats, clock: Clock) -> None:
    stats.next_iteration()
    stats.mark("train")
    clock.pass_(2)
    with stats.timer("gather"):
        clock.pass_(1)
    stats.lap("train")
    clock.pass_(3)
    stats.lap("train")
    clock.pass_(50)
    record = stats.next_iteration()
    assert record is not None
    assert record.parts == {"gather": 1, "prepare": 0, "generate": 0, "train": 5, "others": 50}


def test_a_step_without_train_before_it_counts_nothing(stats: Stats, clock: Clock) -> None:
    stats.mark("train")
    stats.next_iteration()
    clock.pass_(4)
    stats.lap("train")
    assert stats.seconds == {}


def test_a_step_inside_a_timer_is_not_counted_twice(stats: Stats, clock: Clock) -> None:
    stats.mark("train")
    clock.pass_(1)
    with stats.timer("generate"):
        clock.pass_(2)
        stats.lap("train")
        clock.pass_(4)
    assert stats.seconds == {"train": 1, "generate": 6}


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "exit", "mark", "lap", "next"]),
        st.sampled_from(["generate", "prefill", "decode", "gather", "train", "score"]),
        st.integers(0, 8),
    ),
    max_size=40,
)


@given(actions=_ACTIONS)
def test_parts_never_exceed_the_whole(actions: list[tuple[str, str, int]]) -> None:
    clock = Clock()
    stats, open_timers = Stats(clock=clock), []
    records: list[Iteration] = []
    for action, name, seconds in actions:
        if action == "enter":
            open_timers.append(stats.timer(name).__enter__())
        elif action == "exit" and open_timers:
            open_timers.pop().__exit__(None, None, None)
        elif action == "mark":
            stats.mark(name)
        elif action == "lap":
            stats.lap(name)
        elif action == "next" and (record := stats.next_iteration()):
            records.append(record)
        clock.pass_(seconds)
    if stats.current is not None:
        records.append(stats.current)
    for record in records:
        assert sum(record.seconds.values()) <= record.e2e_seconds
        assert sum(record.parts.values()) == record.e2e_seconds


def test_every_eval_logs_one_line_with_all_parts(
    stats: Stats, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stats.next_iteration()
    one_iteration(stats, clock)
    stats.record_kv_bytes(3 * 2**20)
    stats.fallback("num_beams=4")
    with caplog.at_level(logging.INFO, logger="hybrid_fx"):
        record = stats.next_iteration()
    assert [entry.getMessage() for entry in caplog.records] == [str(record)]
    assert str(record) == (
        "iteration 0 | E2E 28.000 s | gather 1.000 s (3.6 %) | prepare 2.000 s (7.1 %) | "
        "generate 12.000 s (42.9 %) | train 6.000 s (21.4 %) | others 7.000 s (25.0 %) | "
        "samples/s 0.50 (average 0.50) | prefill 10.0 tokens/s | decode 20.0 tokens/s | "
        "KV 3.0 MiB | fallbacks: num_beams=4 x1"
    )


def test_the_data_is_plain_and_complete(stats: Stats, clock: Clock) -> None:
    stats.next_iteration()
    one_iteration(stats, clock)
    stats.count("prepares")
    stats.record_kv_bytes(500)
    stats.record_kv_bytes(20)
    stats.next_iteration()
    data = stats.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["counters"] == dict.fromkeys(COUNTERS, 0) | {"prepares": 1}
    assert (data["kv_bytes"], data["kv_bytes_peak"]) == (20, 500)
    assert data["samples_per_second"] == 0.5
    assert data["decode_tokens_per_second"] == 20
    assert data["last"]["parts"]["generate"] == 12


def test_an_unknown_counter_is_refused_with_the_known_ones(stats: Stats) -> None:
    with pytest.raises(ValueError, match="'capture' is not known; use one of captures"):
        stats.count("capture")


def test_two_engines_do_not_see_each_other(stats: Stats, clock: Clock) -> None:
    other = Stats(clock=clock)
    with stats.timer("decode", tokens=3):
        clock.pass_(1)
        with other.timer("prefill"):
            clock.pass_(1)
    stats.count("captures")
    assert stats.seconds == {"decode": 2}
    assert other.seconds == {"prefill": 1}
    assert other.counters["captures"] == 0


def test_history_is_bounded_and_totals_are_not(clock: Clock) -> None:
    stats = Stats(clock=clock, history=2)
    stats.next_iteration()
    for _ in range(5):
        one_iteration(stats, clock)
        stats.next_iteration()
    assert [record.index for record in stats.iterations] == [3, 4]
    assert stats.as_dict()["iterations"] == 5
    assert stats.samples == 70


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_bytes_are_written_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert readable_bytes(size) == text
