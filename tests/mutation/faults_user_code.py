"""Mistakes about what a model says of itself, and about code of a user's in its forward."""

from __future__ import annotations

from mutant import Fault, Group

_WINDOWS = "tests/laws/test_windows_followed.py"
_OWN = "tests/laws/test_user_code_followed.py"
_SIZES = f"{_OWN}::test_a_hook_that_looks_at_sizes_gives_the_tokens_of_transformers"
_READS = (
    "tests/laws/test_user_settings_followed.py"
    "::test_what_a_hook_reads_is_followed_wherever_it_is_kept"
)

GROUPS = (
    Group(
        "captures in threads",
        "hybrid_fx/capture/registry.py",
        (f"{_OWN}::test_models_that_are_captured_in_threads_of_their_own_are_all_captured",),
        (
            Fault(
                "one takes the other's entry away",
                "    with _ENTRY:\n",
                "    with contextlib.nullcontext():\n",
            ),
        ),
    ),
    Group(
        "what a trace assumes",
        "hybrid_fx/capture/assumed.py",
        (_OWN,),
        (
            Fault("a branch on a size is dropped", '== "True"', "is not None", (_SIZES,)),
            Fault(
                "a trace stops before it finds that the inputs of a call are alike",
                "condition.xreplace(alike)",
                "condition",
                (
                    "tests/capture/test_watch.py::"
                    "test_a_condition_that_ends_when_inputs_are_found_alike_does_not_decide",
                ),
            ),
            Fault(
                "a write to an object is dropped",
                "changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]",
                "changed: list[Any] = []",
                (f"{_OWN}::test_a_hook_that_counts_its_calls_counts_them",),
            ),
        ),
    ),
    Group(
        "what is a library's, of what a trace writes",
        "hybrid_fx/capture/assumed.py",
        ("tests/capture/test_assumed.py",),
        (Fault("by the beginning of its name", "(_dot_|'\\])", "_"),),
    ),
    Group(
        "steps of a user's code",
        "hybrid_fx/engine/prover.py",
        (_OWN,),
        (
            Fault("generate is not tried", "and self._runs_own_code()", "and 0", (_SIZES,)),
            Fault(
                "ranks try nothing and serve",
                "if source.collective and may_ask",
                "if 0 and may_ask",
                ("tests/engine/test_step_proof.py",),
            ),
        ),
    ),
    Group(
        "how generate is tried",
        "hybrid_fx/engine/step_proof.py",
        (f"{_OWN}::test_what_only_generate_passes_is_tried", _SIZES),
        (
            Fault("no row is padded", "BATCHES = ((0, 3), (0,))", "BATCHES = ((0, 0), (0,))"),
            Fault("one row is not looked at", "BATCHES = ((0, 3), (0,))", "BATCHES = ((0, 3),)"),
            Fault("too few steps", "PROMPT, STEPS = 9, 8", "PROMPT, STEPS = 9, 2"),
        ),
    ),
    Group(
        "whose code it is",
        "hybrid_fx/cache/roots.py",
        (_OWN,),
        (
            Fault(
                "a class of the user's is a library's",
                "        if own[kind]:\n",
                "        if False:\n",
                (f"{_OWN}::test_a_module_that_tells_a_prompt_from_a_token_does_so_here_too",),
            ),
            Fault(
                "a hook of the user's is a library's",
                "roots += [value for value in called if _is_own(value)]",
                "roots += []",
                (_READS, _SIZES),
            ),
            Fault(
                "what stands in a library's class is the library's",
                "return roots + list(_patched(own))",
                "return roots",
                (f"{_OWN}::test_what_only_generate_passes_is_tried",),
            ),
        ),
    ),
    Group(
        "what a user's code reads",
        "hybrid_fx/cache/reach.py",
        (_READS,),
        (
            Fault(
                "a closure is passed by",
                "(*cells, function.__defaults__,",
                "(function.__defaults__,",
            ),
            Fault("defaults are passed by", "*cells, function.__defaults__, ", "*cells, "),
            Fault(
                "arguments of a partial are passed by",
                "(value.func, value.args, value.keywords)",
                "(value.func,)",
            ),
            Fault(
                "globals are passed by", "self._work.append(space[name])", "self.atoms.append(name)"
            ),
            Fault("names are those of one reading", "names |= reach.found", "return reach.atoms"),
            Fault(
                "the owner of a method is passed by",
                "(value.__self__, value.__func__)",
                "(value.__func__,)",
            ),
            Fault("a class is passed by", "        self._class(kind)\n", ""),
            Fault(
                "what an object holds is passed by",
                "held[name] if name in held else",
                "None if name in held else",
            ),
        ),
    ),
    Group(
        "what a user's code reads, in the stamp and in the key",
        "hybrid_fx/cache/stamp.py",
        (_READS,),
        (Fault("not in the stamp", "    look.own()\n", ""),),
    ),
    Group(
        "what a user's code reads, in the key",
        "hybrid_fx/cache/key.py",
        (_READS,),
        (Fault("not in the key", "own=_own(model, prints),", 'own="",'),),
    ),
    Group(
        "windows of the cache",
        "hybrid_fx/capture/cache_windows.py",
        (_WINDOWS,),
        (Fault("what the cache forgets is not looked at", "if size and not", "if False and not"),),
    ),
    Group(
        "positions of a forward",
        "hybrid_fx/generate/routes.py",
        (f"{_WINDOWS}::test_a_forward_that_names_no_positions_counts_columns",),
        (
            Fault(
                "positions skip padding all the same",
                'if "position_ids" not in inspect',
                'if False and "position_ids" not in inspect',
            ),
        ),
    ),
)
