"""Mistakes about what a model says of itself, and about code of a user's in its forward."""

from __future__ import annotations

from mutant import Fault, Group

_WINDOWS = "tests/laws/test_windows_followed.py"
_OWN = "tests/laws/test_user_code_followed.py"
_SIZES = f"{_OWN}::test_a_hook_that_looks_at_sizes_gives_the_tokens_of_transformers"
_READS = f"{_OWN}::test_what_a_hook_reads_is_followed_wherever_it_is_kept"

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
            Fault("a branch on a size is dropped", '!= "True"', "is None", (_SIZES,)),
            Fault(
                "a write to an object is dropped",
                "changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]",
                "changed: list[Any] = []",
                (f"{_OWN}::test_a_hook_that_counts_its_calls_counts_them",),
            ),
        ),
    ),
    Group(
        "steps of a user's code",
        "hybrid_fx/engine/prover.py",
        (_SIZES,),
        (
            Fault("no step of the module is looked at", "and self._tells_steps_apart()", "and 0"),
            Fault("one row is not looked at", "for rows in (2, 1):", "for rows in (2,):"),
        ),
    ),
    Group(
        "whose code it is",
        "hybrid_fx/engine/own_code.py",
        (_OWN,),
        (
            Fault(
                "a class of the user's is a library's",
                "if is_users(type(module).__module__) or",
                "if",
                (f"{_OWN}::test_a_module_that_tells_a_prompt_from_a_token_does_so_here_too",),
            ),
            Fault("a hook of the user's is a library's", "and _is_users(hook)\n", "and False\n"),
        ),
    ),
    Group(
        "what a user's code reads",
        "hybrid_fx/cache/stamp.py",
        (_READS,),
        (
            Fault(
                "what a closure holds is not looked into",
                "self.value(cell.cell_contents)",
                "self.value(cell.cell_contents, _DEPTH)",
            ),
            Fault(
                "globals are told by what they are",
                "self.used(space, [function.__code__])",
                "pass",
            ),
            Fault(
                "a record in a record is not looked into",
                "elif depth < _DEPTH and is_record(item):",
                "elif False:",
            ),
        ),
    ),
    Group(
        "what a user's code reads, in the key",
        "hybrid_fx/cache/fingerprint.py",
        (_READS,),
        (Fault("a record in a record is left out", " or is_record(v)", ""),),
    ),
    Group(
        "what a user's code reads, of its module",
        "hybrid_fx/cache/helpers.py",
        (_READS,),
        (
            Fault(
                "an object is told by its class",
                "if is_record(value) and is_users(module_name):",
                "if False:",
            ),
        ),
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
