"""Capture a structure, unless an earlier capture of it failed and would fail again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ..cache.plan_cache import PlanCache
from ..capture import Captured, assumptions, function_modes, options_of_dynamo
from ..errors import CaptureError, CaptureTimeoutError
from ..plan.failure import Failure


def capture_once(cache: PlanCache, digest: str, attempt: Callable[[], Captured]) -> Captured:
    """What ``attempt()`` returns. Where it fails, that is remembered.

    On the disk what lies in the structure; in memory that it took too long, for the limit belongs
    to the engine. Nothing is remembered of what a trace is not needed to find, and of what need
    not last: memory that ran out, an error within Dynamo, whatever came of a caller's
    ``TorchFunctionMode``, which is traced as well.

    Args:
        digest: Of the key of what is captured.

    Raises:
        CaptureError: where it failed, now or earlier.
    """
    name = hashlib.sha256(f"{digest} failure".encode()).hexdigest()
    guards = assumptions() | {"options of Dynamo": options_of_dynamo()}
    known, file = cache.get_failure(name) or (None, None)
    if known is not None and known.guards == guards:
        said = f" (known from an earlier capture; delete {file} to try again)" if file else ""
        raise CaptureError(known.reason + said)
    try:
        return attempt()
    except CaptureError as error:
        slow = isinstance(error, CaptureTimeoutError)
        if (error.lasting and not function_modes()) or slow:
            failure = Failure(reason=str(error).strip().split("\n")[0], guards=guards)
            cache.put_failure(name, failure, on_disk=not slow)
        raise
