"""Which passes and policies a configuration asks for; what does not fit is refused by name."""

from __future__ import annotations

from ..config import HybridConfig
from ..errors import ConfigError
from ..passes.contract import Pass, Pipeline, PipelineError
from ..passes.pipeline import NEW_WEIGHTS, OPTIONAL, PACK
from ..passes.policies import POLICIES
from ..passes.roles import Policy


def optional_passes(config: HybridConfig, *, stream: bool = False) -> Pipeline:
    """The passes over layers: the library's and the user's, less those switched off.

    A pass of the user's runs as late as its contract allows, before weights are packed.

    Args:
        stream: Layers gather their weights while they run: nothing is made of those.

    Raises:
        ConfigError: for passes that do not fit together, a name that no pass has, or a pass that
            is not for generating.
    """
    off = {*config.disable_passes, *(["fold_lora"] if config.lora == "side" else [])}
    off |= NEW_WEIGHTS if stream else frozenset()
    if config.graph == "inductor":
        off.add("pack_weights")  # it takes no opaque tensors
    try:
        pipeline = OPTIONAL
        for one in config.passes:
            pipeline = pipeline.insert(_usable(one))
        return (pipeline + PACK).without(off)
    except PipelineError as error:
        raise ConfigError(str(error)) from error


def _usable(one: Pass) -> Pass:
    if "inference" not in one.modes:
        raise ConfigError(
            f"pass {one.name} is sound in {sorted(one.modes)}; an engine generates without "
            "gradients, so add 'inference' to its modes or leave it out"
        )
    if one.inputs:
        raise ConfigError(
            f"pass {one.name} adds the inputs {sorted(one.inputs)}, which no generate gives; "
            "compute them in the graph"
        )
    return one


def policies(config: HybridConfig) -> tuple[Policy, ...]:
    """The user's policies, tried first, then the library's.

    Raises:
        ConfigError: where two policies have one name.
    """
    both = (*config.policies, *POLICIES)
    names = [policy.name for policy in both]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two policies are called {twice!r}; give yours another name")
    return both
