"""The seam to autocast inside a forward, above all what accelerate puts on a model.

``Accelerator(mixed_precision=...).prepare(model)``, and so a Trainer with ``bf16=True``, replaces
``model.forward`` by one that runs under autocast, in training and in inference alike. Casts that
autocast chooses by operator and dtype are no part of a captured graph, so such a forward is
refused, with the remedy. Tried on accelerate 1.15.
"""

from __future__ import annotations

from torch import fx, nn

from ..errors import CaptureError

_WRAPPER = ("accelerate.utils.operations", "ConvertOutputsToFp32")


def refuse_prepared(model: nn.Module) -> None:
    """Raise a CaptureError where accelerate put an autocast on a module of ``model``."""
    for path, module in model.named_modules():
        if _is_prepared(module):
            raise CaptureError(
                f"accelerate runs the forward of {path or 'the model'} under autocast "
                "(mixed_precision of an Accelerator, bf16 or fp16 of a Trainer); load the model in "
                "bfloat16 and leave mixed precision off, or call accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False) and train under accelerator.autocast()"
            )


def _is_prepared(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    while forward is not None:
        if (type(forward).__module__, type(forward).__name__) == _WRAPPER:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def refuse_autocast(graph: fx.Graph) -> None:
    """Raise a CaptureError where a traced forward turns autocast on."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") == "_enter_autocast" and node.args[2:3] != (False,):
            device, dtype = node.args[:2]
            raise CaptureError(
                f"the forward turns on autocast ({device}, {dtype}); load the model in that dtype "
                "and leave autocast out of its forward"
            )
