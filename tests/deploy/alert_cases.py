"""For every alert: numbers of a job over minutes, when it must be quiet, when it must fire, and what it then says."""

from dataclasses import dataclass

_JOB = 'job="evermesh",role="controller",instance="a:1",run="llm"'
_NODE = 'job="evermesh",role="agent",instance="b:2",run="llm",node="node-3",host="gpu-17"'
_OF_JOB = {"job": "evermesh", "role": "controller", "instance": "a:1", "run": "llm"}
_OF_NODE = {"job": "evermesh", "role": "agent", "instance": "b:2", "run": "llm", "node": "node-3", "host": "gpu-17"}
_TRAINING = {f'evermesh_job_state{{{_JOB},state="training"}}': "1x200"}
_SINCE_LONG = {f"evermesh_started_timestamp_seconds{{{_JOB}}}": "-86400x200"}


@dataclass(frozen=True, slots=True)
class Case:
    """Values are one a minute, in the notation of promtool."""

    alert: str
    series: dict[str, str]
    quiet_at: str
    fires_at: str
    labels: dict[str, str]
    summary: str
    quiet_again_at: str | None = None


CASES = (
    Case(
        "EvermeshControllerSilent",
        {f"up{{{_JOB}}}": "1x5 0x10 1x10"},
        "6m",
        "8m",
        _OF_JOB,
        "The controller of llm does not answer at a:1.",
        "18m",
    ),
    Case(
        "EvermeshNoSteps",
        {f"evermesh_trained_steps_total{{{_JOB}}}": "0+10x20 200x60", **_TRAINING, **_SINCE_LONG},
        "30m",
        "40m",
        _OF_JOB,
        "llm has made no step for 15 minutes.",
    ),
    Case(
        "EvermeshWaitsForNodes",
        {f'evermesh_job_state{{{_JOB},state="waiting"}}': "0x5 1x10 0x5"},
        "6m",
        "9m",
        {**_OF_JOB, "state": "waiting"},
        "llm waits for nodes.",
        "17m",
    ),
    Case(
        "EvermeshRestartsUsedUp",
        {f"evermesh_restarts_total{{{_JOB}}}": "0x2 1x2 2x2 3x20", f"evermesh_restarts_allowed{{{_JOB}}}": "3x30"},
        "5m",
        "10m",
        _OF_JOB,
        "llm has restarted 3 times, as often as it may: the next failure ends it.",
    ),
    Case(
        "EvermeshLossNotFinite",
        {f"evermesh_loss{{{_JOB}}}": "2x3 NaN NaN NaN 2x10"},
        "3m",
        "5m",
        _OF_JOB,
        "The loss of llm is not a number.",
        "8m",
    ),
    Case(
        "EvermeshSkipsSteps",
        {
            f"evermesh_skipped_steps_total{{{_JOB}}}": "0x30 0+5x60",
            f"evermesh_trained_steps_total{{{_JOB}}}": "0+20x100",
        },
        "30m",
        "85m",
        _OF_JOB,
        "llm skips 25% of its steps.",
    ),
    Case(
        "EvermeshFinding",
        {f'evermesh_finding_confidence{{{_JOB},kind="hang",node="node-3",rank="7"}}': "0.2x3 0.9x10 0.2x5"},
        "3m",
        "6m",
        {**_OF_JOB, "kind": "hang", "node": "node-3", "rank": "7"},
        "llm: hang, node node-3, rank 7.",
        "15m",
    ),
    Case(
        "EvermeshNodeNotReady",
        {f'evermesh_node_state{{{_JOB},node="node-3",host="gpu-17",state="cut off"}}': "0x3 1x10 0x5"},
        "4m",
        "6m",
        {**_OF_JOB, "node": "node-3", "host": "gpu-17", "state": "cut off"},
        "Node node-3 (gpu-17) of llm is cut off.",
        "15m",
    ),
    Case(
        "EvermeshAgentSilent",
        {f"up{{{_NODE}}}": "1x3 0x10 1x5"},
        "4m",
        "6m",
        _OF_NODE,
        "The agent of node-3 (gpu-17), llm, is silent at b:2.",
        "15m",
    ),
    Case(
        "EvermeshAgentWithoutController",
        {f"evermesh_agent_without_controller_seconds{{{_NODE}}}": "0x3 30x1 90+60x10"},
        "4m",
        "6m",
        _OF_NODE,
        "node-3 of llm has had no controller for 1m 30s.",
    ),
    Case(
        "EvermeshRankStopped",
        {f'evermesh_agent_rank_stopped_seconds{{{_NODE},rank="7"}}': "0x3 10x1 70x5 0x5"},
        "4m",
        "6m",
        {**_OF_NODE, "rank": "7"},
        "Rank 7 on node-3 of llm is stopped (SIGSTOP, or a debugger).",
        "13m",
    ),
    Case(
        "EvermeshSnapshotOld",
        {
            f"evermesh_step{{{_JOB}}}": "0+4x100",
            f"evermesh_snapshot_step{{{_JOB}}}": "0+4x20 80x80",
            f"evermesh_snapshot_interval_steps{{{_JOB}}}": "2x100",
            **_TRAINING,
        },
        "21m",
        "30m",
        _OF_JOB,
        "A restart of llm would lose 40 steps: snapshots are not completed.",
    ),
    Case(
        "EvermeshSnapshotDegraded",
        {f'evermesh_snapshot_protection{{{_JOB},state="degraded"}}': "0x3 1x30 0x5"},
        "10m",
        "15m",
        {**_OF_JOB, "state": "degraded"},
        "Fewer nodes protect the snapshots of llm than should.",
        "36m",
    ),
    Case(
        "EvermeshGoodputLow",
        {
            f'evermesh_step_part_seconds_total{{{_JOB},part="training"}}': "0+57x60 3420+30x100",
            f'evermesh_step_part_seconds_total{{{_JOB},part="checkpoint"}}': "0+3x60 180+30x100",
            **_TRAINING,
            **_SINCE_LONG,
        },
        "60m",
        "110m",
        {"run": "llm"},
        "llm spent 50% of the last 30 minutes training.",
    ),
    Case(
        "EvermeshMemoryLow",
        {
            f"evermesh_machine_memory_available_bytes{{{_NODE}}}": "50x5 2x20 50x5",
            f"evermesh_machine_memory_bytes{{{_NODE}}}": "100x40",
        },
        "9m",
        "12m",
        _OF_NODE,
        "node-3 (gpu-17) has 2% of its memory left.",
        "28m",
    ),
    Case(
        "EvermeshOutOfMemoryKill",
        {f"evermesh_machine_oom_kills_total{{{_NODE}}}": "4x5 5x60"},
        "4m",
        "8m",
        _OF_NODE,
        "The kernel ended a process of node-3 (gpu-17) for want of memory.",
        "30m",
    ),
    Case(
        "EvermeshDiskFull",
        {
            f'evermesh_machine_file_system_free_bytes{{{_NODE},folder="/runs"}}': "50x5 4x20 50x5",
            f'evermesh_machine_file_system_bytes{{{_NODE},folder="/runs"}}': "100x40",
        },
        "9m",
        "12m",
        {**_OF_NODE, "folder": "/runs"},
        "/runs on node-3 (gpu-17) has 4% left.",
        "28m",
    ),
)
