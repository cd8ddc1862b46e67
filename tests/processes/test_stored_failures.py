"""A second process knows why a structure has no plan, and generates without tracing."""

from __future__ import annotations

from processes.fresh_process import FAILING, finish, run_case, start


def test_a_second_process_does_not_trace_what_did_not_capture(tmp_path) -> None:
    first = run_case(FAILING, str(tmp_path))
    second = finish(start([FAILING], tmp_path, may_trace=False))[FAILING]
    assert second["tokens"] == first["tokens"]
    assert second["warnings"] == []
    (known,), (found,) = second["fallbacks"], first["fallbacks"]
    (file,) = tmp_path.iterdir()
    assert known == f"{found} (known from an earlier capture; delete {file} to try again)"
