"""Mistakes in the engine: weight versions, what is kept, flags, cache key."""

from __future__ import annotations

from mutant import Fault, Group

_FOLLOWED = "tests/laws/test_weights_followed.py"
_VALUES = f"{_FOLLOWED}::test_changed_values_are_prepared_again_and_nothing_else"
_STEPS = ("tests/engine/test_versions_steps.py",)
_EDITS = ("tests/engine/test_versions_edits.py",)
_HIDDEN = ("tests/engine/test_versions_hidden.py",)
_KEY = "tests/cache/test_key.py"

GROUPS = (
    Group(
        "weight versions",
        "hybrid_fx/engine/versions.py",
        _STEPS,
        (
            Fault(
                "a step of an optimizer is not counted",
                '            self.mark(f"{type(optimizer).__name__}.step()")\n',
                "",
            ),
            Fault(
                "a change that a look found is not counted",
                "        if change is not None and self._told:\n",
                "        if change is not None and not self._told:\n",
                _EDITS,
            ),
            Fault(
                "what was seen is looked at again and again",
                "        self._seen = now\n",
                "",
            ),
            Fault(
                "the hook stays behind",
                "        self._unhook()\n",
                "        pass\n",
                ("tests/engine/test_weight_tracker.py",),
            ),
            Fault(
                "the checksum is not taken",
                'tensors if self._verify == "checksum" else uncounted(now, tensors)',
                "uncounted(now, tensors)",
                _HIDDEN,
            ),
        ),
    ),
    Group(
        "weight versions",
        "hybrid_fx/engine/snapshot.py",
        _EDITS,
        (
            Fault(
                "edits in place are not seen",
                "None if tensor.is_inference() else tensor._version,",
                "None if tensor.is_inference() else 0,",
            ),
            Fault(
                "a storage that was freed is taken for the one at its address",
                "storage = StorageWeakRef(tensor.untyped_storage())",
                "storage = None",
            ),
            Fault(
                "another active adapter is not seen",
                "        if was != state:\n",
                "        if was is None:\n",
                ("tests/engine/test_versions_models.py",),
            ),
            Fault(
                "a checksum that changed is not seen",
                "        if old.sums.get(name, value) != value:\n",
                "        if old.sums.get(name, value) is None:\n",
                _HIDDEN,
            ),
            Fault(
                "an optimizer over a view of a parameter is not seen",
                "                if storage_address(tensor) in storages:\n",
                "                if storage_address(tensor) is None:\n",
                _STEPS,
            ),
        ),
    ),
    Group(
        "checksum",
        "hybrid_fx/engine/checksum.py",
        ("tests/engine/test_checksum.py",),
        (
            Fault(
                "all words weigh the same",
                "return (spread ^ ((spread >> 29) & _LOW_32)) | 1",
                "return torch.ones_like(spread)",
            ),
            Fault("the last words are left out", "parts = [words[full:]]", "parts = [words[:0]]"),
        ),
    ),
    Group(
        "engine",
        "hybrid_fx/engine/graphs.py",
        (_VALUES,),
        (
            Fault(
                "weights that changed are not prepared again",
                "stale = not self.failure and version != self._prepared_version",
                "stale = not self.failure and self._prepared_version is None",
            ),
            Fault(
                "a structure that changed is not captured again",
                "            if stamp == self._stamp:\n",
                "            if self._stamp is not None:\n",
                (f"{_FOLLOWED}::test_a_changed_structure_is_captured_again",),
            ),
        ),
    ),
    Group(
        "engine",
        "hybrid_fx/engine/engine.py",
        (_FOLLOWED,),
        (
            Fault(
                "an explanation in training keeps what it prepared",
                "        if self._training and self._options.release_inference_cache and not",
                "        if not self._training and not",
                ("tests/laws/test_memory_released.py",),
            ),
            Fault(
                "a forward with gradients is no change",
                '            self._tracker.mark("a forward with gradients")\n',
                "            pass\n",
                (f"{_FOLLOWED}::test_a_forward_with_gradients_counts_as_a_change",),
            ),
            Fault(
                "close() leaves generate behind",
                '            del attributes["generate"]\n',
                "",
                ("tests/laws/test_given_back.py::test_close_puts_everything_back",),
            ),
        ),
    ),
    Group(
        "engine",
        "hybrid_fx/engine/stand_in.py",
        ("tests/laws/test_engine_stands_for_model.py",),
        (
            Fault(
                "what is set on an engine stays there",
                "        if self._keeps(name):\n            object.__setattr__",
                "        if self._keeps(name) or name:\n            object.__setattr__",
            ),
            Fault(
                "the engine's own names are written over",
                'if own and not name.startswith("_"):',
                'if own and name.startswith("__"):',
            ),
            Fault(
                "a wrapper hides what is set on its model",
                "return inner if has(inner, name) and not has(model, name) else model",
                "return inner if not has(inner, name) and not has(model, name) else model",
            ),
        ),
    ),
    Group(
        "engine",
        "hybrid_fx/engine/engine.py",
        (
            "tests/laws/test_engine_stands_for_model.py::"
            "test_an_engine_drafts_for_another_as_its_model_does",
        ),
        (
            Fault(
                "an engine that drafts is handed on as one",
                "return given.module if isinstance(given, HybridEngine) else given",
                "return given",
            ),
        ),
    ),
    Group(
        "training flags",
        "hybrid_fx/generate/guard.py",
        ("tests/generate/test_generate_guard.py",),
        (
            Fault(
                "modules stay in eval",
                "            module.training = True\n",
                "            module.training = False\n",
            ),
            Fault(
                "gradient checkpointing stays off",
                "            module.gradient_checkpointing = True",
                "            module.gradient_checkpointing = False",
            ),
        ),
    ),
    Group(
        "cache key",
        "hybrid_fx/cache/key.py",
        (
            f"{_KEY}::test_a_change_is_not_missed",
            f"{_KEY}::test_options_of_the_graph_change_the_digest",
        ),
        (
            Fault(
                "shapes are not part of it",
                "described = (str(tensor.dtype), text(list(tensor.shape)), tensor.device.type)",
                "described = (str(tensor.dtype), tensor.device.type)",
            ),
            Fault(
                "ties are not part of it",
                "if (tied := first.setdefault(id(tensor), name)) != name:",
                "if (tied := first.setdefault(id(tensor), name)) is None:",
            ),
            Fault(
                "the sources of passes are not part of it",
                "    for folder in (Path(__file__).resolve().parent.parent, passes):\n",
                "    for folder in (Path(__file__).resolve().parent.parent,):\n",
                (f"{_KEY}::test_the_package_digest_covers_passes_and_engine",),
            ),
            Fault(
                "options of the graph are not part of it",
                "[field.name for field in fields(config) if field.name not in NOT_IN_GRAPH]",
                '[field.name for field in fields(config) if field.name == "strict"]',
            ),
        ),
    ),
)
