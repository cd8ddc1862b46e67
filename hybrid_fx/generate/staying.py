"""May rows that have finished leave the batch: does what chooses tokens look across rows?

What transformers makes out of its own settings, and what is listed here, treats each row by
itself; read with 5.17, 5.23 and 5.24. Anything else (a processor of the user's, a watermark, a
function of the prefix that is told row numbers, a guidance) is given all rows, as by transformers.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor

from ..compat.transformers import logits_process, stopping_criteria

#: Logits processors whose effect on a row depends on its own tokens and scores alone; see
#: :func:`of_rows`. Not those of an encoder's input, which hold the prompts of all rows.
PROCESSORS = frozenset(
    (
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper"),
        *("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor"),
        *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        *("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"),
        *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"),
        *("SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"),
        *("ExponentialDecayLengthPenalty", "InfNanRemoveLogitsProcessor", "LogitNormalization"),
    )
)

#: Criteria that end a row, or all rows, whatever the scores.
CRITERIA = frozenset(("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria"))


def looks_across(processors: Any, criteria: Any, own: tuple[type, ...] = ()) -> str:
    """What may see a row that has finished, by name; "" where nothing does.

    Args:
        processors: The list of logits processors that transformers made.
        criteria: Its list of stopping criteria.
        own: Criteria of this package.
    """
    for name, entries, plain in (
        ("logits processor", processors, logits_process.LogitsProcessorList),
        ("stopping criterion", criteria, stopping_criteria.StoppingCriteriaList),
    ):
        if type(entries) is not plain:
            return f"{name}s in a {type(entries).__name__}"
    strange = [f"logits processor {_name(p)}" for p in processors if not _is_known(p)]
    strange += [
        f"stopping criterion {_name(c)}" for c in criteria if type(c) not in own and not _ends(c)
    ]
    return ", ".join(dict.fromkeys(strange))


def _name(entry: object) -> str:
    return type(entry).__name__


def _is_known(processor: object) -> bool:
    return _is_one_of(processor, PROCESSORS, logits_process)


def _ends(criterion: object) -> bool:
    return _is_one_of(criterion, CRITERIA, stopping_criteria)


def _is_one_of(entry: object, names: frozenset[str], module: Any) -> bool:
    """Whether an entry is of one of these very classes."""
    kind = type(entry)
    return kind.__name__ in names and getattr(module, kind.__name__, None) is kind


def of_rows(processors: Any, rows: Tensor) -> Any:
    """``processors`` for some rows (int64 ``[N]``) of the call.

    A repetition penalty knows where the prompt of each row begins; the others know no rows.
    """
    return type(processors)(map(functools.partial(_of_rows, rows=rows), processors))


def _of_rows(processor: Any, rows: Tensor) -> Any:
    begins = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(begins, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = begins[rows.to(begins.device)]
    return own
