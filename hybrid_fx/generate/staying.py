"""May rows that have finished leave the batch: does what chooses tokens look across rows?

What transformers makes out of its own settings, and what is listed here, treats each row by
itself; read with 5.17 and 5.23. Anything else (a processor of the user's, a watermark, a function
of the prefix that is told row numbers, a guidance) is given all rows, as by transformers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.generation import logits_process, stopping_criteria

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


def may_leave(processors: Any, criteria: Any, own: tuple[type, ...] = ()) -> bool:
    """Whether nobody sees a row that has finished.

    Args:
        processors: The list of logits processors that transformers made.
        criteria: Its list of stopping criteria.
        own: Criteria of this package.
    """
    if type(processors) is not logits_process.LogitsProcessorList:
        return False
    if type(criteria) is not stopping_criteria.StoppingCriteriaList:
        return False
    return _are(processors, PROCESSORS, logits_process) and _are(
        (entry for entry in criteria if type(entry) not in own), CRITERIA, stopping_criteria
    )


def _are(entries: Iterable[Any], names: frozenset[str], module: Any) -> bool:
    """Whether each entry is of one of these very classes."""
    kinds = map(type, entries)
    return all(k.__name__ in names and getattr(module, k.__name__, None) is k for k in kinds)


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
