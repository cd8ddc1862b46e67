"""Mistakes in recorded decode steps: what is kept, what is masked, what is refused."""

from __future__ import annotations

from mutant import Fault, Group

_TOKENS = "tests/laws/test_recorded_tokens.py"
_KEPT = "tests/laws/test_recordings_kept.py"
_COLUMNS = "tests/laws/test_recorded_columns.py"
_REFUSED = "tests/laws/test_recording_refused.py"
_RECORDING = ("tests/runtime/test_recording.py",)


def _claim(file: str, name: str) -> tuple[str, ...]:
    return (f"{file}::test_{name}",)


GROUPS = (
    Group(
        "recorded steps",
        "hybrid_fx/runtime/recorded.py",
        (_TOKENS, _KEPT, _REFUSED),
        (
            Fault(
                "the padding of another call stays",
                "            self._current[0].look(step.valid)\n",
                "",
                _claim(_TOKENS, "the_tokens_are_those_of_transformers_in_each_family"),
            ),
            Fault(
                "weights that lie elsewhere are not seen",
                "memory = (self._places, self._workspace.generation)",
                "memory = (None, self._workspace.generation)",
                _claim(_KEPT, "weights_that_lie_elsewhere_are_recorded_anew"),
            ),
            Fault(
                "new memory for keys and values is not seen",
                "memory = (self._places, self._workspace.generation)",
                "memory = (self._places, None)",
                _claim(_KEPT, "more_memory_is_recorded_anew_and_the_old_is_dropped"),
            ),
            Fault(
                "logits are written by the next step",
                "recording.replay()[: len(step.ids)].clone()",
                "recording.replay()[: len(step.ids)]",
                _claim(_TOKENS, "logits_that_were_handed_out_outlive_the_next_step"),
            ),
            Fault(
                "a recording serves unproven",
                "if not distance <= self._allowed:",
                "if distance < 0:",
                _claim(_REFUSED, "a_recording_that_says_something_else_is_found_out"),
            ),
            Fault(
                "keys and values of a recording that was refused stay",
                "            return step.eager()  # once more",
                "            return logits  # once more",
                _claim(_REFUSED, "a_recording_that_says_something_else_is_found_out"),
            ),
            Fault(
                "rows that are not apart stand beside others",
                "{*powers, rows} if padded else set()",
                "{*powers, rows}",
                _claim(_KEPT, "rows_that_are_not_apart_are_never_beside_others"),
            ),
            Fault(
                "every number of rows is recorded",
                "{*powers, rows} if padded else set()",
                "set()",
                _claim(_KEPT, "rows_that_leave_step_down_through_powers_of_two"),
            ),
        ),
    ),
    Group(
        "recorded attention",
        "hybrid_fx/runtime/attend_at.py",
        _RECORDING,
        (
            Fault(
                "columns behind the new one are seen",
                "(valid & (columns <= at))",
                "valid",
            ),
            Fault(
                "the window is one column longer",
                "seen & (columns > at - window)",
                "seen & (columns >= at - window)",
            ),
            Fault("a row may see nothing", " | (columns == at)", ""),
            Fault("the softcap is lost", "scale, softcap, sinks)", "scale, 0.0, sinks)"),
            Fault("sinks are lost", "scale, softcap, sinks)", "scale, softcap, None)"),
            Fault("written out, every column counts", "mask[:, 0, 0] == 0", "mask[:, 0, 0] <= 0"),
        ),
    ),
    Group(
        "recorded memory",
        "hybrid_fx/runtime/workspace.py",
        _RECORDING,
        (
            Fault(
                "what a former session wrote stays",
                "                memory.zero_()",
                "                memory.detach()",
            ),
            Fault("one column is remembered", "start:end] = 0", "start + 1 : end] = 0"),
        ),
    ),
    Group(
        "recorded sessions",
        "hybrid_fx/runtime/session.py",
        (_COLUMNS,),
        (
            Fault(
                "padding that was taken back stays padding",
                "                self._valid[:, length:] = True",
                "                self._valid[:, length:] &= True",
                _claim(_COLUMNS, "columns_that_were_taken_back_are_seen_anew"),
            ),
            Fault(
                "padding among decoded columns is not seen",
                "        self._moved |= key_valid is not None\n",
                "",
                _claim(_COLUMNS, "a_column_that_is_padding_when_it_comes_is_never_seen"),
            ),
        ),
    ),
    Group(
        "recording",
        "hybrid_fx/runtime/recording.py",
        _RECORDING,
        (
            Fault("a mask may index", "        if name in _INDEXING:\n", "        if not name:\n"),
            Fault(
                "host data is recorded",
                '        if name == "lift_fresh":\n',
                "        if not name:\n",
            ),
            Fault(
                "a copy to the host is recorded",
                "if name in _COPIES and result.device != self._device:",
                "if not name:",
            ),
            Fault(
                "a pool that nothing uses is captured into",
                "        self._pool = None  # one",
                "        self._pool = self._pool  # one",
            ),
            Fault(
                "a capture is on torch's stream, of whatever GPU",
                "cuda.graph(graph, stream=stream, **options)",
                "cuda.graph(graph, **options)",
            ),
            Fault(
                "kernels of a failed warm-up still write while others go on",
                "            finally:\n                here.wait_stream(stream)",
                "            except KeyError:\n                raise\n"
                "            else:\n                here.wait_stream(stream)",
            ),
        ),
    ),
)
