"""Plans for pipelines: number, contents and order of the micro-batches of every pipeline."""

from evermesh.parallelism.planner.pipelines.bound import pipeline_bound
from evermesh.parallelism.planner.pipelines.plan import Planned, pipelines_s, plan_pipelines, plan_pipelines_s

__all__ = ["Planned", "pipeline_bound", "pipelines_s", "plan_pipelines", "plan_pipelines_s"]
