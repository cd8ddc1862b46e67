"""Running a plan: the KV workspace, prepared tensors, sessions."""

from .runner import PlanRunner

__all__ = ["PlanRunner"]
