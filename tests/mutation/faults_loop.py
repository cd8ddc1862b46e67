"""Mistakes in the decoding loop: which rows run, what is fed, what is drawn, when rows end."""

from __future__ import annotations

from mutant import Fault, Group

_LOOP = "tests/generate/test_generate_fast.py"
_FAST = (
    f"{_LOOP}::test_greedy_tokens_are_those_of_hf_for_left_padded_rows",
    f"{_LOOP}::test_sampled_tokens_and_random_state_are_those_of_hf",
)
_LEAVING = "tests/generate/test_generate_leaving.py"
_PROMPTS = "tests/generate/test_generate_prompts.py"
_AHEAD = "tests/generate/test_generate_ahead.py"
_LARGEST = "tests/generate/test_generate_largest.py"
_DRAWS = "tests/generate/test_generate_draws.py"

GROUPS = (
    Group(
        "largest of a row",
        "hybrid_fx/generate/largest.py",
        (_LARGEST,),
        (
            Fault("what is behind the last whole block is left out", "whole < width", "False"),
            Fault("the last block reaches behind the row", ".clamp_(max=width - _BLOCK)", ""),
            Fault("the place in the row is that in its block", "first[:, 0] + ", ""),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/running.py",
        _FAST,
        (
            Fault("positions stand still", "(self._last + 1)", "(self._last + 0)"),
            Fault(
                "rows that leave take their places with them",
                "self._last = self._last[places]",
                "self._last = self._last[: len(stay)]",
            ),
            Fault(
                "a row that waits leaves the positions", ".clamp_max(self._end)", "", (_PROMPTS,)
            ),
        ),
    ),
    Group(
        "looking ahead",
        "hybrid_fx/generate/running.py",
        (_AHEAD,),
        (
            Fault(
                "what is chosen of belongs to rows that left",
                "self._logits = self._logits[places]",
                "self._logits = self._logits[: len(stay)]",
            ),
        ),
    ),
    Group(
        "looking ahead",
        "hybrid_fx/generate/decode.py",
        (_AHEAD,),
        (
            Fault(
                "a forward is queued behind the last step",
                "settings.ahead and record.ids.shape[1] < config.max_length",
                "settings.ahead",
            ),
            Fault("no forward is queued", "queued = settings.ahead and", "queued = False and"),
            Fault("a step is forwarded twice", "if not queued:", "if True:"),
        ),
    ),
    Group(
        "looking ahead",
        "hybrid_fx/generate/host.py",
        (_AHEAD,),
        (
            Fault(
                "a streamer is given memory of the loop", "self._host[0].clone()", "self._host[0]"
            ),
        ),
    ),
    Group(
        "looking ahead",
        "hybrid_fx/generate/loop.py",
        (_AHEAD,),
        (Fault("ranks forward what others do not", "ahead=alone and ", "ahead="),),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/decode.py",
        _FAST,
        (
            Fault(
                "finished rows go on",
                "tokens = chosen * self.unfinished + pad * (1 - self.unfinished)",
                "tokens = chosen + pad * 0",
                (f"{_LEAVING}::test_rows_stay_where_something_may_look_across_them",),
            ),
            Fault(
                "finished rows stay",
                "    return looks_across(settings.process, settings.stop, (RowLengths,))",
                '    return "them"',
                (f"{_LEAVING}::test_a_row_that_has_ended_is_fed_no_more",),
            ),
            Fault(
                "rows leave where scores are returned",
                "if record.scores is not None or record.logits is not None:",
                "if False:",
                (f"{_LEAVING}::test_rows_stay_where_something_may_look_across_them",),
            ),
            Fault(
                "finished rows are counted as running",
                "record.waited += len(runs) - sum(runs)",
                "record.waited += len(runs)",
                ("tests/runtime/test_loop_statistics.py",),
            ),
            Fault(
                "processors are told of the first rows",
                "process = of_rows(settings.process, running.index)",
                "process = of_rows(settings.process, torch.arange(len(runs)))",
                (f"{_LEAVING}::test_a_penalty_that_skips_each_rows_padding_follows_the_rows",),
            ),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/prompt.py",
        _FAST,
        (
            Fault(
                "padding takes positions",
                "positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)",
                "positions = torch.arange(prompt)[None].expand(batch, prompt)",
                (
                    "tests/generate/test_generate_fast.py::"
                    "test_positions_of_a_prompt_are_hfs_where_the_model_takes_none",
                ),
            ),
            Fault(
                "a mask is not handed to the graphs",
                "valid = None if mask is None or",
                "valid = None if mask is None or len(mask) or",
            ),
            Fault(
                "rows of another padding are alike",
                "parts += [] if columns.valid is None else [columns.valid.long()]",
                "parts += []",
                (f"{_PROMPTS}::test_rows_that_differ_in_padding_or_positions_are_not_alike",),
            ),
            Fault(
                "every row is prefilled",
                "again = len(firsts) < len(alike)",
                "again = False",
                (f"{_PROMPTS}::test_rows_with_the_same_prompt_are_prefilled_once",),
            ),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/hf_draws.py",
        _FAST,
        (
            Fault(
                "a draw takes other random numbers",
                "            noise.uniform_().neg_()\n",
                "            noise.uniform_()\n",
            ),
            Fault(
                "noise is that of rows which ran before",
                "self._kept[0] != list(rows)",
                "False",
                (f"{_DRAWS}::test_any_rows_draw_what_they_draw_among_all",),
            ),
            Fault(
                "rows that left draw nothing",
                "                noise.view(torch.int64).random_()",
                "                noise.view(torch.int64)",
                (f"{_DRAWS}::test_any_rows_draw_what_they_draw_among_all",),
            ),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/own_draws.py",
        (_DRAWS,),
        (
            Fault("all rows draw one number", "seed + (row + 1) * _ODD", "seed + _ODD"),
            Fault(
                "a token without probability is drawn at the edge",
                "torch.minimum(target, below), right=True",
                "torch.minimum(target, below), right=False",
            ),
            Fault(
                "the end of the vocabulary is out of reach",
                "torch.minimum(target, below), right=True",
                "target * 0.99, right=True",
            ),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/generate/lengths.py",
        (_PROMPTS,),
        (
            Fault(
                "a row ends one token early",
                "return self._lengths <= input_ids.shape[1] - self._prompt",
                "return self._lengths <= input_ids.shape[1] - self._prompt + 1",
            ),
            Fault(
                "samples of a prompt take the next one's length",
                "[length for length in lengths for _ in range(repeats)]",
                "[length for _ in range(repeats) for length in lengths]",
            ),
        ),
    ),
    Group(
        "lengths of rows",
        "hybrid_fx/generate/checks.py",
        (_PROMPTS,),
        (
            Fault(
                "the longest prompt counts for every row",
                "each = starts if",
                "each = [start] * len(lengths) if 1 or",
            ),
            Fault("the first row counts", "row = ends.index(max(ends))", "row = 0"),
        ),
    ),
    Group(
        "lengths of rows",
        "hybrid_fx/generate/__init__.py",
        (_PROMPTS,),
        (
            Fault("rows are alone on every way", "lengths if route is Route.FAST", "lengths if 1"),
            Fault(
                "rows are alone in the module",
                "                check_positions(request)  # rows",
                "                # rows",
            ),
        ),
    ),
    Group(
        "decoding loop",
        "hybrid_fx/runtime/probe.py",
        ("tests/laws/test_rows_together.py",),
        (
            Fault(
                "nobody asks whether rows depend on one another",
                "session.reorder(torch.tensor([1, 1],",
                "session.reorder(torch.tensor([0, 1],",
            ),
        ),
    ),
    Group(
        "starting over",
        "hybrid_fx/generate/starting_over.py",
        ("tests/generate/test_generate_starting_over.py",),
        (
            Fault("drafts stay drawn", "set_random_state(self._device, self._state)", "pass"),
            Fault("a streamer hears the prompt at once", "if self._waiting is None:", "if True:"),
            Fault(
                "a processor is asked twice",
                "drafts and any(request.arguments.get(name) for name in _ASKED_BY_DRAFTS)",
                "False",
            ),
        ),
    ),
    Group(
        "what is assumed of transformers",
        "hybrid_fx/compat/transformers.py",
        ("tests/compat/test_compat_transformers.py",),
        (
            Fault(
                "a cache of ours has no layers",
                "[DynamicLayer() for _ in range(layers)]",
                "[]",
            ),
            Fault(
                "a former name wins",
                "named.setdefault(current, arguments[name])",
                "named[current] = arguments[name]",
            ),
        ),
    ),
)
