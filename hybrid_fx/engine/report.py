"""Gather what ``engine.explain()`` says from the plan, the model and the statistics."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..cache.adapters import configs
from ..cache.tree import View
from ..config import HybridConfig
from ..generate import causal_lm
from ..passes.outcome import LayerReport, Missed
from ..runtime import PlanRunner
from .copies import PreparedCopy, prepared_copies
from .explain import Explanation, LoraDecision
from .graphs import ModelGraphs
from .iteration import readable_bytes
from .pass_table import pass_reports
from .sides import FOLD_LIMIT
from .stats import Stats
from .training_graphs import TrainingGraphs


def _layer(row: Any) -> LayerReport:
    missed = tuple(Missed(**entry) for entry in row["missed"])
    return LayerReport(row["path"], row["policy"], tuple(row["fused"]), missed)


def _lora(config: HybridConfig, graphs: ModelGraphs) -> tuple[LoraDecision, ...]:
    runner = graphs.runner
    if runner is None:
        return ()
    folded = [str(site) for site in runner.plan.manifest.lora]
    found = []
    for site in dict.fromkeys([*graphs.errors, *folded]):
        error = graphs.errors.get(site)
        if site in folded:
            reason = f'lora="{config.lora}"'
            found.append(LoraDecision(site, "fold", reason, error))
        else:
            reason = f"rounding would take more than {FOLD_LIMIT:.0%} of it"
            found.append(LoraDecision(site, "side", reason, error))
    return tuple(found)


def _other_adapters(model: nn.Module) -> tuple[LoraDecision, ...]:
    """Adapters that are not LoRA: they run as the graph or the module has them."""
    found = {}
    for name, config in configs(model).items():
        kind = str(getattr(getattr(config, "peft_type", ""), "value", ""))
        if kind and kind != "LORA":
            found[name] = LoraDecision(name, "unfolded", f"{kind} does not fold")
    return tuple(found.values())


def _hook_notes(model: nn.Module, view: View) -> list[str]:
    notes = []
    for path, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(view.foreign_hook, hooks)):
            notes.append(
                f"forward hook on {path or 'the model'}: what it returns is part of the graphs; "
                "what else it does happens only while they are captured"
            )
    return notes


def _module_layers(model: nn.Module, failure: str) -> tuple[LayerReport, ...]:
    """The decoder layers of a model without a graph: none of them is rewritten."""
    config = causal_lm(model).config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", 0)
    missed = (Missed("all", "the model", "a captured graph", failure),)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0:
            return tuple(LayerReport(f"{path}.{i}", None, (), missed) for i in range(depth))
    return ()


def _team_notes(shard: tuple[int, int], layers: tuple[LayerReport, ...]) -> list[str]:
    rank, size = shard
    if size == 1:
        return []
    missed = (layer.path for layer in layers if any(m.what == "shard_tp" for m in layer.missed))
    paths = ", ".join(missed)
    whole = f"; attention is whole on each of them in {paths}" if paths else ""
    return [f"{size} ranks generate together, and this one is number {rank} of them{whole}"]


def _recording_notes(config: HybridConfig, runner: PlanRunner | None) -> list[str]:
    if config.graph != "cudagraphs" or runner is None:
        return []
    steps = runner.recorded
    if steps is None:
        return [
            f'graph="cudagraphs": the model is on {runner.device}; decode steps run as they are'
        ]
    if steps.failure:
        return [f'graph="cudagraphs": decode steps are not recorded: {steps.failure}']
    return [f'graph="cudagraphs": recordings of the decode step: {len(steps)}']


def _training_notes(training: TrainingGraphs) -> list[str]:
    if training.failure:
        return [training.failure]
    return [] if training.plan else ["train_graph=True: the first training forward captures it"]


def _copies(config: HybridConfig, graphs: ModelGraphs) -> tuple[PreparedCopy, ...]:
    if graphs.runner is None:
        return ()
    refused = None if graphs.rows is None else graphs.rows.copied
    return prepared_copies(graphs.runner, asked=config.share_storage, refused=refused)


def build_explanation(
    model: nn.Module,
    config: HybridConfig,
    graphs: ModelGraphs,
    stats: Stats,
    training: TrainingGraphs | None,
    *,
    view: View,
    passes: bool = False,
) -> Explanation:
    """The report of an engine as it stands."""
    runner = graphs.runner
    notes = [graphs.failure] if graphs.failure else []
    trained = None if training is None else training.plan
    plans = [plan for plan in (runner and runner.plan, trained) if plan]
    if training is not None:
        notes += _training_notes(training)
    notes += _hook_notes(model, view)
    if runner is not None and runner.plan.manifest.streamed:
        notes.append(
            "pin_parameters=false: each layer gathers its weights while it runs, at most "
            f"{readable_bytes(runner.streamed_bytes)} of them at once; nothing is stacked, and "
            "adapters run as low-rank branches"
        )
    if config.graph == "inductor":
        notes.append('graph="inductor": weights are not packed, as it takes no opaque tensors')
    notes += _recording_notes(config, None if graphs.failure else runner)
    if runner is not None and not graphs.failure and not runner.rows_apart:
        notes.append(
            "a row's logits depend on the rows beside it: rows that have finished stay in the "
            "batch, and prompts that are alike are each computed"
        )
    notes += [
        f"{tokens} tokens were computed for rows that had finished and stayed in the batch: {why}"
        for why, tokens in stats.waited.items()
    ]
    if config.lora == "side":
        notes.append('lora="side": adapters run as low-rank branches')
    rows = () if runner is None else runner.plan.manifest.layers
    layers = tuple(map(_layer, rows)) if rows else _module_layers(model, graphs.failure)
    notes += _team_notes(graphs.shard, layers)
    weights = {t.untyped_storage()._cdata: t for t in graphs.tensors().values()}
    return Explanation(
        layers=layers,
        matched=sum(layer.policy is not None for layer in layers),
        total=len(layers),
        weight_bytes=sum(t.untyped_storage().nbytes() for t in weights.values()),
        prepared_bytes=0 if runner is None else runner.prepared.nbytes,
        prepare_peak_bytes=graphs.prepare_peak_bytes,
        kv_bytes=0 if runner is None else runner.workspace.nbytes,
        recorded_bytes=0 if runner is None else runner.recorded_bytes,
        shared_bytes=0 if runner is None else runner.prepared.shared_nbytes,
        copies=_copies(config, graphs),
        lora=_lora(config, graphs) + _other_adapters(model),
        fallbacks=dict(stats.fallbacks),
        sources={stage: source for plan in plans for stage, source in plan.sources.items()},
        notes=tuple(notes),
        passes=pass_reports([row for plan in plans if passes for row in plan.manifest.passes]),
    )
