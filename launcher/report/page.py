"""The report of a run as one HTML file that needs nothing else: no script, no picture and no font from anywhere."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from evermesh.launcher.progress import duration
from evermesh.launcher.report.gathering import MFU_CONVENTION, JobReport, Material
from evermesh.launcher.report.incidents import Incident
from evermesh.launcher.report.pictures import loss_svg, time_svg

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; }
th, td { padding: .25rem .8rem .25rem 0; } th { font-weight: 600; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { background: #2456a6; height: .7rem; min-width: 1px; } .dim { color: #6b6b6b; } svg { width: 100%; height: auto; }
details { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .9rem; margin: .6rem 0; } summary { cursor: pointer; }
.state { display: inline-block; padding: 0 .6rem; border-radius: 1rem; background: #eee; } .failed { background: #f6d5d1; }
.finished, .training { background: #d4ebdc; } td.text { overflow-wrap: anywhere; white-space: pre-wrap; }
"""
_MOST_INCIDENTS = 200


def page(report: JobReport, material: Material) -> str:
    """The report as HTML."""
    sections = [
        _head(report),
        _facts(report),
        _where_time_went(report),
        _pictures(material),
        _incidents(report.incidents),
        _notable(report),
        _events(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(report.name)}: report</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _head(report: JobReport) -> str:
    began = datetime.fromtimestamp(report.began_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f'<h1>{escape(report.name)} <span class="state {escape(report.state)}">{escape(report.state)}</span></h1>'
        f'<p class="dim">launched {began}; {escape(report.directory)}<br>{escape(report.reason)}</p>'
    )


def _facts(report: JobReport) -> str:
    training, cost = report.training, report.cost
    steps = f"{training.steps:,}" + (f" of {training.steps_wanted:,}" if training.steps_wanted else "")
    loss = (
        "" if training.loss is None else f"{training.first_loss:.4f} at the first step, {training.loss:.4f} at the last"
    )
    price = "" if cost.price is None else f", {cost.price:,.2f} in all"
    rows = [
        ("wall time", f"{duration(report.wall_s)}, goodput {report.goodput:.1%}"),
        ("workers", f"{report.workers:,} on {report.nodes:,} nodes, {report.attempts:,} attempts"),
        ("cost", f"{cost.worker_hours:,.4g} worker hours{price}"),
        (
            "of these",
            f"{cost.useful_worker_hours:,.4g} in steps that count, {cost.lost_worker_hours:,.3g} in steps trained again",
        ),
        ("steps", f"{steps}; {training.skipped:,} skipped, {training.trained_again:,} trained again"),
        ("loss", loss),
        ("gradient norm", f"{training.largest_grad_norm:.4g} at most"),
        ("tokens", f"{training.tokens:,}, {training.tokens_per_s:,.0f} per second of steps that count"),
        ("model FLOPs", _flops(report)),
    ]
    return f"<table>{''.join(_row(name, escape(value)) for name, value in rows if value)}</table>"


def _flops(report: JobReport) -> str:
    training = report.training
    if not training.flops_per_s_and_worker:
        return ""
    share = "" if training.utilisation is None else f", utilisation {training.utilisation:.1%}"
    return f"{training.flops_per_s_and_worker / 1e12:,.4g} TFLOP/s per worker{share}. {MFU_CONVENTION}"


def _where_time_went(report: JobReport) -> str:
    largest = max(report.parts.values(), default=1.0)
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="number">{_seconds(seconds)}</td>'
        f'<td class="number">{seconds / report.wall_s:.1%}</td>'
        f'<td style="width:40%"><div class="bar" style="width:{100 * seconds / largest:.2f}%"></div></td></tr>'
        for name, seconds in report.parts.items()
    )
    return f"<h2>Where the time went</h2><table>{rows}</table>"


def _pictures(material: Material) -> str:
    return "\n".join(filter(None, (time_svg(material), loss_svg(material))))


def _incidents(incidents: Sequence[Incident]) -> str:
    if not incidents:
        return "<h2>Incidents</h2><p>None: no attempt ended before the job did.</p>"
    shown = incidents[:_MOST_INCIDENTS]
    more = f"<p>{len(incidents) - len(shown):,} more are left out.</p>" if len(shown) < len(incidents) else ""
    return f"<h2>Incidents</h2>{''.join(map(_incident, shown))}{more}"


def _incident(incident: Incident) -> str:
    again = "" if incident.until_training_s is None else f" after {_seconds(incident.until_training_s)}"
    lost = f"{incident.steps_lost:,} steps lost" + (f", state from {incident.source}" if incident.source else "")
    phases = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in incident.phases)
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in incident.throughput)
    clock = datetime.fromtimestamp(incident.time_s, UTC).strftime("%H:%M:%S")
    story = "".join(
        f'<tr><td class="number">{moment.after_s:+.2f} s</td><th>{escape(moment.kind)}</th>'
        f'<td class="text">{escape(moment.text)}</td></tr>'
        for moment in incident.story
    )
    told = f"{escape(incident.cause)}: {escape(incident.outcome)}{again}; {escape(lost)}"
    return (
        f"<details open><summary><b>{clock}</b> {told}</summary>"
        f'<p class="dim">attempt {incident.attempt}{escape(phases and f"; {phases}")}'
        f"{rates and f'<br>tokens/s: {escape(rates)}'}</p><table>{story}</table></details>"
    )


def _notable(report: JobReport) -> str:
    if not report.notable:
        return ""
    rows = "".join(
        f'<tr><td class="number">{_seconds(event.time_s - report.began_s)}</td><th>{escape(event.kind)}</th>'
        f'<td class="number">{"" if event.step is None else event.step}</td><td class="text">{escape(event.text)}</td></tr>'
        for event in report.notable
    )
    head = "<tr><th>after</th><th>what</th><th>step</th><th></th></tr>"
    return f"<h2>Findings and decisions</h2><table>{head}{rows}</table>"


def _events(report: JobReport) -> str:
    rows = ", ".join(f"{escape(kind)} {count:,}" for kind, count in report.events.items())
    return f'<h2>Event log</h2><p class="dim">{rows or "empty"}</p>'


def _row(name: str, value: str) -> str:
    return f'<tr><th>{escape(name)}</th><td class="text">{value}</td></tr>'


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else duration(seconds)
