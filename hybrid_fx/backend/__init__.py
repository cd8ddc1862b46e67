"""``torch.compile(model, backend="hybrid_fx")``: the passes on Dynamo's graphs."""

from .compile import hybrid_fx
from .options import BackendOptions
from .report import GraphReport

__all__ = ["BackendOptions", "GraphReport", "hybrid_fx"]
