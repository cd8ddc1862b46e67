"""Mistakes between the passes and the engine: capture, plan, workspace, sessions."""

from __future__ import annotations

from mutant import Fault, Group

_SESSIONS = ("tests/runtime/test_sessions.py",)

_WINDOWS = "tests/laws/test_windows_followed.py"
_RELEASED = ("tests/laws/test_memory_released.py",)

GROUPS = (
    Group(
        "capture",
        "hybrid_fx/capture/registry.py",
        (
            "tests/capture/test_capture.py::test_windows_that_alternate_arrive_layer_by_layer",
            "tests/capture/test_capture.py::"
            "test_one_capture_serves_every_batch_and_length_without_a_difference",
        ),
        (
            Fault("the window is lost", "sliding_window or 0, softcap", "0, softcap"),
            Fault(
                "the window is the one that an attention says",
                "attention_mask, sliding_window = None, masked",
                "attention_mask = None",
                (f"{_WINDOWS}::test_the_window_is_that_of_the_mask",),
            ),
            Fault(
                "whoever listens to an attention is not asked",
                "and not by_mask",
                "and False",
                (
                    f"{_WINDOWS}::test_an_implementation_that_listens_to_an_attention_must_hear_the_"
                    "window_of_the_mask",
                ),
            ),
            Fault(
                "the scale is that of another head size",
                "query.shape[-1] ** -0.5 if scaling is None else float(scaling)",
                "query.shape[-1] ** -0.5 / 2",
            ),
            Fault(
                "attention that is not causal is taken",
                "    if attention_mask is not None or not causal:",
                "    if attention_mask is not None:",
                ("tests/capture/test_capture.py::test_attention_that_is_not_causal_is_refused",),
            ),
            Fault(
                "the configured attention does not come back",
                "for config, name in zip(configs, before, strict=True):\n",
                "for config, name in zip(configs[1:], before[1:], strict=True):\n",
                ("tests/capture/test_registries.py",),
            ),
        ),
    ),
    Group(
        "capture",
        "hybrid_fx/capture/idle_hooks.py",
        tuple(
            f"tests/capture/test_capture.py::{name}"
            for name in (
                "test_backward_hooks_are_no_part_of_inference_and_stay_in_their_places",
                "test_a_training_capture_leaves_no_backward_hook_out",
            )
        ),
        (
            Fault("backward hooks are lost", "            hooks.update(all_of_them)\n", ""),
            Fault(
                "a training capture leaves a backward hook out",
                "(module._backward_hooks, lambda _: training)",
                "(module._backward_hooks, lambda _: False)",
            ),
            Fault(
                "the hook that counts forwards is traced",
                " and not is_ours(hook)",
                "",
                (
                    "tests/laws/test_engine_stands_for_model.py::"
                    "test_a_generate_inside_one_that_runs_the_module_works",
                ),
            ),
        ),
    ),
    Group(
        "capture",
        "hybrid_fx/engine/attempt.py",
        ("tests/engine/test_failing_captures.py",),
        (
            Fault(
                "what a caller's mode did is remembered",
                "error.lasting and not function_modes()",
                "error.lasting",
            ),
        ),
    ),
    Group(
        "capture",
        "hybrid_fx/capture/mixed_precision.py",
        ("tests/laws/test_mixed_precision.py",),
        (
            Fault(
                "the autocast of accelerate is not found under what wraps it",
                'forward = getattr(forward, "__wrapped__", None)',
                "forward = None",
            ),
        ),
    ),
    Group(
        "workspace",
        "hybrid_fx/runtime/workspace.py",
        _SESSIONS,
        (
            Fault(
                "frames of an error keep the workspace",
                "        for held in (self._memory, self.keys, self.values):\n"
                "            held.clear()\n",
                "        self._memory, self.keys, self.values = [], [], []\n",
                _RELEASED,
            ),
            Fault(
                "values stay where the old rows stood",
                "(key[rows, :, :length], value[rows, :, :length])",
                "(key[rows, :, :length], value[: len(rows), :, :length])",
            ),
            Fault(
                "moving rows loses the last position",
                "new_key[:, :, :length] = key",
                "new_key[:, :, : length - 1] = key[:, :, : length - 1]",
            ),
            Fault(
                "rows that move within the memory stay where they were",
                "torch.stack((moved, rows[moved]))",
                "torch.stack((moved, moved))",
            ),
            Fault(
                "rows that keep their place are copied",
                "moved = (rows != torch.arange(count, device=rows.device))",
                "moved = (rows >= 0)",
            ),
            Fault(
                "memory that does not suffice is kept",
                "if rows * pitch > self._slots:",
                "if rows > self._slots:",
            ),
        ),
    ),
    Group(
        "sessions",
        "hybrid_fx/runtime/session.py",
        _SESSIONS,
        (
            Fault(
                "rows lie into one another",
                "start = torch.arange(self.batch, device=self._device)[:, None] * pitch",
                "start = torch.arange(self.batch, device=self._device)[:, None] * (pitch - 1)",
            ),
            Fault(
                "validity stands one column early",
                "self._valid[:, self.length : length] = new",
                "self._valid[:, max(0, self.length - 1) : max(0, self.length - 1) + tokens] = new",
            ),
            Fault(
                "growing forgets the last column",
                "self._workspace.relay(rows, pitch, self.length)",
                "self._workspace.relay(rows, pitch, self.length - 1)",
            ),
            Fault(
                "validity keeps the old order of rows",
                "self._valid[to_device(rows, self._device)]",
                "self._valid[: len(rows)]",
            ),
            Fault(
                "rows on the host are looked up by a device that waits",
                "self._valid[to_device(rows, self._device)]",
                "self._valid[rows]",
            ),
            Fault(
                "cropping keeps what it should forget",
                "self.length = min(self.length, length)",
                "self.length = max(self.length, length)",
            ),
            Fault(
                "a decode reads a slot too few",
                "            self._slots[:, :length],\n",
                "            self._slots[:, 1 : length + 1],\n",
            ),
        ),
    ),
    Group(
        "prepared tensors",
        "hybrid_fx/runtime/prepared.py",
        ("tests/runtime/test_prepared_tensors.py",),
        (
            Fault(
                "frames of an error keep the prepared tensors",
                "        self.tensors.clear()\n",
                "        self.tensors = []\n",
                _RELEASED,
            ),
            Fault(
                "memory that is kept keeps the old weights",
                "value = kept.copy_(value)",
                "value = kept",
            ),
            Fault(
                "memory of another dtype is refilled",
                "                and kept.dtype == value.dtype\n",
                "",
            ),
            Fault(
                "a version that is not whole can be used",
                "        if missing:\n",
                "        if not self._next:\n",
            ),
            Fault(
                "weights are copied",
                "            return wanted.owns_memory\n",
                "            return True\n",
            ),
        ),
    ),
    Group(
        "shared rows",
        "hybrid_fx/runtime/shared_rows.py",
        ("tests/runtime/test_shared_rows.py",),
        (
            Fault(
                "a stack is taken for that of parameters that were put elsewhere",
                "            and storage_of(weight) == storage.cdata\n"
                "            and weight.data_ptr() == address\n",
                "",
            ),
            Fault(
                "tied parameters are torn apart",
                "if others := [user for user in self._users[storage_of(weight)] if user != name]:",
                "if others := []:",
            ),
            Fault(
                "views are torn from what they are views of",
                "if weight.nbytes != weight.untyped_storage().nbytes() or not weight.nbytes:",
                "if not weight.nbytes:",
            ),
            Fault(
                "memory that something else holds is left behind",
                "            if not is_alone(weight):\n",
                "            if False:\n",
            ),
            Fault(
                "a parameter is taken out of another stack",
                "            if storage_of(weight) in self._ours:\n",
                "            if False:\n",
            ),
            Fault(
                "pieces stand otherwise to the boundaries",
                "        return (first.data_ptr() - memory.data_ptr()) % boundary\n",
                "        return 0\n",
            ),
            Fault(
                "engines take a stack from one another for ever",
                "        self._done.add(names)\n",
                "",
            ),
            Fault(
                "what nobody lies in is still lent",
                "if stack.places <= places])",
                "])",
            ),
        ),
    ),
    Group(
        "shared rows",
        "hybrid_fx/runtime/prepared.py",
        ("tests/runtime/test_shared_rows.py::test_a_refill_never_reaches_a_parameter",),
        (
            Fault(
                "a stack in which weights lie is refilled",
                "        if self._rows is not None and self._rows.lent(value):\n"
                "            return False\n",
                "",
            ),
            Fault(
                "what was ours is held beside what is lent",
                "            self._kept[index] = None  # what",
                "            pass  # what",
            ),
        ),
    ),
    Group(
        "shared rows",
        "hybrid_fx/engine/graphs.py",
        ("tests/engine/test_share_storage.py",),
        (
            Fault(
                "laying out counts as a change of weights",
                "rows.laying_out(tensors, self._tracker.follow)",
                "rows.laying_out(tensors, lambda: None)",
            ),
            Fault(
                "a closed engine leaves its layout behind",
                "            self.rows.undo(self.tensors())\n",
                "            pass\n",
            ),
        ),
    ),
    Group(
        "probe",
        "hybrid_fx/runtime/probe.py",
        (
            "tests/processes/test_stored_plans.py::"
            "test_a_valid_plan_that_is_wrong_for_the_model_is_found_and_replaced",
        ),
        (
            Fault(
                "a plan that differs is used",
                "    if not distance <= allowed:\n",
                "    if distance > 1e9:\n",
            ),
        ),
    ),
    Group(
        "plan",
        "hybrid_fx/plan/prepare.py",
        ("tests/golden/test_golden.py",),
        (
            Fault(
                "prepared tensors are stored under the wrong number",
                "(targets[name], index, *",
                "(targets[name], len(results) - 1 - index, *",
                _SESSIONS,
            ),
        ),
    ),
    Group(
        "plan",
        "hybrid_fx/plan/build.py",
        ("tests/golden/test_golden.py",),
        (
            Fault(
                "the prefill's passes make the decode",
                '("decode", DECODE)',
                '("decode", PREFILL)',
            ),
        ),
    ),
)
