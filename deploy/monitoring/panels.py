"""What the dashboard of Grafana shows, row by row: every panel with its queries. ``$run`` is chosen on the page."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "state-timeline", "table"]
Unit = Literal["none", "short", "s", "bytes", "Bps", "percentunit", "dateTimeFromNow", "dtdurations", "locale", "nats"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression; ``legend`` may name labels as {{node}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel, ``width`` of 24 columns wide."""

    title: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    text: str = ""
    """What one should know to read it."""
    stacked: bool = False
    logarithmic: bool = False
    least: float | None = None
    most: float | None = None
    """Of the axis; None: as the values are."""


def _of(name: str, *, more: str = "") -> str:
    """A series of the runs that were chosen."""
    return f'{name}{{run=~"$run"{more}}}'


def _rate(name: str, *, more: str = "") -> str:
    return f"rate({_of(name, more=more)}[$__rate_interval])"


_BY_RUN = "{{run}}"
_BY_NODE = "{{run}} {{node}}"

_HEAD = (
    Panel("Jobs", "none", (Query(f"{_of('evermesh_job_state')} == 1", "{{run}}: {{state}}"),), "stat", 6),
    Panel("Step", "locale", (Query(_of("evermesh_step"), _BY_RUN),), "stat", 4),
    Panel("Time left", "dtdurations", (Query(_of("evermesh_time_left_seconds"), _BY_RUN),), "stat", 4),
    Panel("Restarts", "locale", (Query(_of("evermesh_restarts_total"), _BY_RUN),), "stat", 3),
    Panel("Findings", "locale", (Query(_of("evermesh_findings"), _BY_RUN),), "stat", 3),
    Panel("A restart would lose", "locale", (Query(_of("evermesh_restart_lost_steps"), "{{run}} steps"),), "stat", 4),
)

_TRAINING = (
    Panel(
        "Loss",
        "nats",
        (
            Query(_of("evermesh_loss"), _BY_RUN),
            Query(_of("evermesh_held_out_loss"), "{{run}} held out"),
        ),
        text="Mean per counted token of the newest step.",
    ),
    Panel(
        "Gradient norm",
        "short",
        (Query(_of("evermesh_gradient_norm"), _BY_RUN),),
        logarithmic=True,
        text="Before it is clipped.",
    ),
    Panel("Learning rate", "short", (Query(_of("evermesh_learning_rate"), _BY_RUN),)),
    Panel(
        "Throughput",
        "short",
        (
            Query(_of("evermesh_tokens_per_second"), "{{run}} newest step"),
            Query(_rate("evermesh_trained_tokens_total"), "{{run}} mean"),
        ),
        text="Tokens per second. The mean counts the time between steps, and tokens that were trained again.",
        least=0,
    ),
    Panel("Time of a step", "s", (Query(_of("evermesh_step_seconds"), _BY_RUN),), least=0),
    Panel(
        "Goodput",
        "percentunit",
        (Query(f"sum by (part) ({_rate('evermesh_step_part_seconds_total')})", "{{part}}"),),
        stacked=True,
        least=0,
        most=1,
        text="Wall time by what rank 0 spent it on; what is missing to 100 % went to starts, restarts and waits for nodes.",
    ),
    Panel(
        "State",
        "none",
        (Query(_of("evermesh_job_state"), "{{run}} {{state}}"),),
        "state-timeline",
        12,
    ),
    Panel(
        "Skipped steps and restarts",
        "short",
        (
            Query(f"increase({_of('evermesh_skipped_steps_total')}[$__rate_interval])", "{{run}} skipped"),
            Query(f"increase({_of('evermesh_restarts_total')}[$__rate_interval])", "{{run}} restarts"),
        ),
        width=12,
        least=0,
    ),
)

_PLAN = (
    Panel(
        "Makespan over bound",
        "short",
        (Query(_of("evermesh_plan_makespan_ratio"), _BY_RUN),),
        text="Planned time of the newest step over what no plan can beat: 1.00 is the best there is.",
        least=1,
    ),
    Panel("Fill of micro-batches", "percentunit", (Query(_of("evermesh_plan_fill_ratio"), _BY_RUN),), least=0, most=1),
    Panel(
        "Sent by tier of the link",
        "Bps",
        (Query(f"sum by (run, tier) ({_rate('evermesh_sent_bytes_total')})", "{{run}} {{tier}}"),),
        stacked=True,
    ),
    Panel(
        "Slowest and fastest rank",
        "s",
        (
            Query(f"max by (run) ({_of('evermesh_rank_compute_seconds')})", "{{run}} slowest"),
            Query(f"quantile by (run) (0.5, {_of('evermesh_rank_compute_seconds')})", "{{run}} median"),
            Query(f"min by (run) ({_of('evermesh_rank_compute_seconds')})", "{{run}} fastest"),
        ),
        width=12,
        text="Seconds that ranks computed before they met the others. Plans are balanced: a rank that stays above is slow.",
        least=0,
    ),
    Panel(
        "Slowest ranks now",
        "s",
        (Query(f"topk(10, {_of('evermesh_rank_compute_seconds')})", "rank {{rank}} on {{node}}"),),
        "table",
        12,
    ),
)

_HEALTH = (
    Panel(
        "Findings",
        "percentunit",
        (Query(_of("evermesh_finding_confidence"), "{{kind}} {{node}} {{rank}}"),),
        text="How sure the detectors are; nothing is drawn while nothing is found.",
        least=0,
        most=1,
    ),
    Panel(
        "Nodes by state",
        "short",
        (Query(f"sum by (state) ({_of('evermesh_node_state')})", "{{state}}"),),
        stacked=True,
        least=0,
    ),
    Panel(
        "Lease left",
        "s",
        (Query(_of("evermesh_node_lease_left_seconds"), _BY_NODE),),
        text="Until a node counts as lost, unless it is heard.",
        least=0,
    ),
    Panel(
        "Steps that would be lost",
        "short",
        (
            Query(_of("evermesh_restart_lost_steps"), "{{run}} by a restart"),
            Query(_of("evermesh_node_loss_lost_steps"), "{{run}} by a lost node"),
        ),
        least=0,
    ),
    Panel("Age of the snapshot", "s", (Query(_of("evermesh_snapshot_age_seconds"), _BY_RUN),), least=0),
    Panel(
        "Memory of snapshots",
        "bytes",
        (Query(_of("evermesh_node_snapshot_bytes"), _BY_NODE),),
        stacked=True,
        least=0,
    ),
    Panel(
        "Events",
        "short",
        (Query(f"sum by (kind) (increase({_of('evermesh_events_total')}[$__rate_interval]))", "{{kind}}"),),
        width=24,
        least=0,
    ),
)

_IDLE = _rate("evermesh_machine_processor_seconds_total", more=', mode="idle"')
_SENT = _rate("evermesh_machine_network_sent_bytes_total", more=', interface!="lo"')
_MACHINES = (
    Panel(
        "Processors",
        "percentunit",
        (
            Query(
                f"1 - sum by (run, node) ({_IDLE}) / sum by (run, node) ({_of('evermesh_machine_processors')})",
                _BY_NODE,
            ),
        ),
        least=0,
        most=1,
    ),
    Panel(
        "Memory available",
        "percentunit",
        (
            Query(
                f"{_of('evermesh_machine_memory_available_bytes')} / {_of('evermesh_machine_memory_bytes')}", _BY_NODE
            ),
        ),
        least=0,
        most=1,
    ),
    Panel(
        "Free on file systems",
        "percentunit",
        (
            Query(
                f"{_of('evermesh_machine_file_system_free_bytes')} / {_of('evermesh_machine_file_system_bytes')}",
                "{{node}} {{folder}}",
            ),
        ),
        least=0,
        most=1,
    ),
    Panel(
        "Sent by network cards",
        "Bps",
        (
            Query(
                f"sum by (run, node) ({_SENT})",
                _BY_NODE,
            ),
        ),
        least=0,
    ),
    Panel(
        "Damaged and dropped packets",
        "short",
        (
            Query(f"sum by (run, node) ({_rate('evermesh_machine_network_receive_errors_total')})", "{{node}} damaged"),
            Query(f"sum by (run, node) ({_rate('evermesh_machine_network_receive_drops_total')})", "{{node}} dropped"),
        ),
        text="Per second.",
        least=0,
    ),
    Panel(
        "Ranks without work",
        "s",
        (
            Query(_of("evermesh_agent_rank_idle_seconds"), "rank {{rank}}"),
            Query(_of("evermesh_agent_rank_stopped_seconds"), "rank {{rank}} stopped"),
        ),
        text="Seconds since a rank was seen to do anything.",
        least=0,
    ),
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Now", _HEAD),
    ("Training", _TRAINING),
    ("Plans and ranks", _PLAN),
    ("Health and snapshots", _HEALTH),
    ("Machines", _MACHINES),
)
"""Titles of rows and their panels."""
