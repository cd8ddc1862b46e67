"""The rewriting library: matcher, rewriter, graph specification and passes over FX graphs.

What a pass or a policy of your own needs is here; :mod:`.pattern` has the pieces of patterns, and
:mod:`.graph` what passes do to nodes. ``README.md`` in this folder shows how both are written.
"""

from .contract import ANY, FACTS, Context, Pass, PassError, PassResult, Pipeline, PipelineError
from .driver import PassRecord, run_passes
from .pipeline import DECODE, NORMALIZE, OPTIONAL, PASSES, PREFILL, STAGE, STREAM, copy_graph
from .rewrite import Rule, apply_rule, safe_to_replace
from .roles import LayerMatch, Policy, Role, match_layer
from .spec import IllegalGraphError, check_graph

__all__ = [
    "ANY",
    "DECODE",
    "FACTS",
    "NORMALIZE",
    "OPTIONAL",
    "PASSES",
    "PREFILL",
    "STAGE",
    "STREAM",
    "Context",
    "IllegalGraphError",
    "LayerMatch",
    "Pass",
    "PassError",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "PipelineError",
    "Policy",
    "Role",
    "Rule",
    "apply_rule",
    "check_graph",
    "copy_graph",
    "match_layer",
    "run_passes",
    "safe_to_replace",
]
