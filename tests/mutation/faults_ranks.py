"""Mistakes in what several ranks say together."""

from __future__ import annotations

from mutant import Fault, Group

GROUPS = (
    Group(
        "ranks",
        "hybrid_fx/distributed/rank_board.py",
        ("tests/distributed/test_rank_board.py",),
        (
            Fault(
                "records are counted from the start, not from a step",
                "count + 1 if step == last else 0)",
                "count + 1)",
            ),
            Fault(
                "a line is logged before all records are there",
                "        if whole and not complete:\n",
                "        if whole and complete is None:\n",
            ),
            Fault(
                "a record that is not there is waited for",
                "        if not self._store.check([key]):",
                "        if not key:",
            ),
            Fault(
                "the last line does not wait for the others",
                "            self._finish(whole=False)\n\n    def _finish",
                "            self._finish(whole=True)\n\n    def _finish",
            ),
            Fault(
                "records that came too late stay in the store",
                "        self._late = [] if complete else keys\n",
                "        self._late = []\n",
            ),
        ),
    ),
    Group(
        "ranks",
        "hybrid_fx/distributed/ranks_iteration.py",
        ("tests/distributed/test_rank_board.py",),
        (
            Fault("the most is the least", "len(found), max(found)", "len(found), min(found)"),
            Fault(
                "the share of gathering leaves preparing out",
                'parts["prepare"] + parts["generate"] for parts',
                'parts["generate"] for parts',
            ),
            Fault(
                "tokens are divided by the time of all ranks",
                "longest = max(record.seconds.get(name, 0.0) for",
                "longest = sum(record.seconds.get(name, 0.0) for",
            ),
        ),
    ),
    Group(
        "ranks",
        "hybrid_fx/distributed/random_states.py",
        (
            "tests/distributed/test_random_states.py::"
            "test_ranks_of_one_job_are_alike_by_team_or_all_of_them_or_none",
            "tests/distributed/test_random_states.py::"
            "test_another_choice_is_refused_with_the_known_ones",
        ),
        (
            Fault(
                "ranks share a state that asked for none",
                'if choice == "all" and world > 1:',
                'if choice != "group" and world > 1:',
            ),
            Fault(
                "any word chooses who shares a state",
                "if choice not in CHOICES:",
                "if choice not in CHOICES and choice == 0:",
            ),
        ),
    ),
)
