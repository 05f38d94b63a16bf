"""The alerts that come with Evermesh, each with its expression and the way out."""

import re

from evermesh.deploy.monitoring.alerts import ALERTS, Alert

_WORDS = {"critical": "wake somebody", "warning": "look at it in the day"}


def alerts_list() -> str:
    """A part for every alert."""
    return "\n\n".join(_part(alert) for alert in ALERTS)


def _part(alert: Alert) -> str:
    lasts = f" when it has lasted for {_duration(alert.for_s)}" if alert.for_s else ""
    text = re.sub(r"{{\s*\$labels\.(\w+)[^}]*}}", lambda found: found[1].upper(), alert.text)
    text = re.sub(r"{{[^}]*}}", "N", text)
    return (
        f"**`{alert.name}`**: {_WORDS[alert.severity]}{lasts}. *{text}* {alert.way_out}\n\n```promql\n{alert.expr}\n```"
    )


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds % 60 else f"{seconds // 60} min"
