"""Replays batch plans: with the aggregate model that planner and certificates use, and event by event."""

from evermesh.parallelism.simulator.aggregate import makespan_s, micro_batch_s, sharing_of, simulate
from evermesh.parallelism.simulator.events import Blocked, Outcome, simulate_events
from evermesh.parallelism.simulator.scenario import Lost, Scenario, SlowLink, SlowRank, Synchronization
from evermesh.parallelism.simulator.timeline import Cause, Span, Timeline, Wait
from evermesh.parallelism.simulator.trace import chrome_trace

__all__ = [
    "Blocked",
    "Cause",
    "Lost",
    "Outcome",
    "Scenario",
    "SlowLink",
    "SlowRank",
    "Span",
    "Synchronization",
    "Timeline",
    "Wait",
    "chrome_trace",
    "makespan_s",
    "micro_batch_s",
    "sharing_of",
    "simulate",
    "simulate_events",
]
