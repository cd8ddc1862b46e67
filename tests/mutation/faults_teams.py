"""Mistakes in what ranks do that generate together."""

from __future__ import annotations

from mutant import Fault, Group

_SESSIONS = ("tests/runtime/test_joint_sessions.py",)
_LOGITS = (
    "tests/runtime/test_joint_sessions.py::"
    "test_the_logits_of_each_rank_are_those_of_its_rows_alone",
)

GROUPS = (
    Group(
        "teams",
        "hybrid_fx/runtime/joint_rows.py",
        _SESSIONS,
        (
            Fault(
                "rows of a later rank continue those of the first",
                "sources.append(rows + held.first)",
                "sources.append(rows)",
            ),
            Fault(
                "rows that begin later do not end with the others",
                "blocks[rank] = replace(blocks[rank], offset=end - turn.ids.shape[1])",
                "blocks[rank] = replace(blocks[rank], offset=0)",
                (
                    "tests/runtime/test_joint_sessions.py::"
                    "test_rows_that_end_together_are_read_without_a_table",
                ),
            ),
            Fault(
                "columns before a row's first are looked at",
                "self._validity()[block.rows, : block.offset] = False",
                "self._validity()[block.rows, : block.offset] = True",
                _LOGITS,
            ),
            Fault(
                "what a former generate left before a row stays",
                "        self._workspace.clear(block.rows, block.offset)\n",
                "",
                (
                    "tests/runtime/test_joint_sessions.py::"
                    "test_stale_memory_before_a_row_does_no_harm",
                ),
            ),
            Fault(
                "columns that fill up the table are looked at",
                "seen = there.expand(block.batch, -1)",
                "seen = torch.ones_like(there).expand(block.batch, -1)",
                _LOGITS,
            ),
            Fault(
                "rows with a gap before them are taken for the first",
                " and _one_behind_the_other(blocks)",
                "",
            ),
            Fault(
                "rows that move are not moved",
                " and torch.equal(sources, stays):",
                ":",
                _LOGITS,
            ),
            Fault(
                "who asked for few logits gets those of all",
                "logits[first : first + block.batch, -turn.keep :]",
                "logits[first : first + block.batch]",
            ),
        ),
    ),
    Group(
        "teams",
        "hybrid_fx/runtime/joint.py",
        _LOGITS,
        (
            Fault(
                "rows that moved twice forget the first time",
                "if self._rows is None else self._rows[rows.to(self._rows.device)]",
                "",
                _SESSIONS,
            ),
            Fault(
                "rows move again with each forward",
                "self._opens, self._rows = False, None",
                "self._opens = False",
            ),
        ),
    ),
    Group(
        "teams",
        "hybrid_fx/distributed/shards.py",
        ("tests/distributed/test_twin.py",),
        (
            Fault(
                "a gather reaches over all layers",
                " or reached > (layers or reached)):",
                "):",
            ),
            Fault(
                "what stands outside of layers is gathered with the last of them",
                "outside = layers is not None and not shard.layer",
                "outside = False",
            ),
        ),
    ),
    Group(
        "teams",
        "hybrid_fx/runtime/prepared.py",
        ("tests/runtime/test_prepared_tensors.py",),
        (
            Fault(
                "a slice keeps the whole weight",
                "                value = value.clone()\n",
                "                pass\n",
            ),
        ),
    ),
    Group(
        "teams",
        "hybrid_fx/generate/settings.py",
        ("tests/generate/test_generate_together.py",),
        (
            Fault(
                "lengths must be equal",
                "if name not in LENGTHS | _ORIGINS",
                "if name not in _ORIGINS",
            ),
            Fault(
                "processors may differ",
                "if (value := request.arguments.get(name)) is not None:",
                "if (value := None) is not None:",
            ),
        ),
    ),
    Group(
        "teams",
        "hybrid_fx/distributed/team.py",
        ("tests/distributed/test_refusals.py",),
        (
            Fault(
                "a degree that does not divide the ranks is taken",
                "if world is not None and world % size:",
                "if world is not None and world < size:",
            ),
            Fault(
                "what the mpu states is not heard",
                "if mpu is not None and degree_of(mpu) != size:",
                "if mpu is not None and degree_of(mpu) < size:",
            ),
        ),
    ),
)
