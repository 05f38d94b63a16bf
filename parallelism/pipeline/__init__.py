"""Pipeline parallelism: the order of actions, the split of layers into stages, and what runs them.

``executor`` and ``deferred`` need torch and are imported by name.
"""

from evermesh.parallelism.pipeline.schedule import Action, Message, PipelineSchedule, ScheduleName, peak_activations
from evermesh.parallelism.pipeline.split import split_layers

__all__ = ["Action", "Message", "PipelineSchedule", "ScheduleName", "peak_activations", "split_layers"]
