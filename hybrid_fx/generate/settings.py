"""What a generate was asked for, as texts that other ranks can be held against."""

from __future__ import annotations

from typing import Any

from .request import Request

#: May differ between ranks that generate together: they say when rows end.
LENGTHS = frozenset("max_length max_new_tokens min_length min_new_tokens max_time".split())

#: Says where a config came from, or is read from the model.
_ORIGINS = frozenset("transformers_version _from_model_config _commit_hash".split())

#: Arguments that are objects of the user's: their kinds count.
_OBJECTS = (
    "logits_processor stopping_criteria prefix_allowed_tokens_fn assistant_model streamer "
    "custom_generate"
).split()


def settings_of(request: Request) -> dict[str, str]:
    """Each setting of the resolved generation config but the lengths, and kinds of objects."""
    config = request.config.to_dict()
    found = {name: repr(value) for name, value in config.items() if name not in LENGTHS | _ORIGINS}
    found["mode"] = request.mode
    for name in _OBJECTS:
        if (value := request.arguments.get(name)) is not None:
            found[name] = _kinds(value)
    return found


def _kinds(value: Any) -> str:
    """The classes of an object, or of those in a list."""
    entries = value if isinstance(value, list | tuple) else [value]
    return ", ".join(type(entry).__qualname__ for entry in entries)
