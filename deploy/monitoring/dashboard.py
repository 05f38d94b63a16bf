"""The dashboard of Grafana as JSON, made of the panels."""

from collections.abc import Iterator
from typing import Any

from evermesh.deploy.monitoring.panels import ROWS, Panel

DATASOURCE = {"type": "prometheus", "uid": "evermesh"}
UID = "evermesh"
_SCHEMA = 39
"""Of dashboards, as Grafana 10.3 and later write them; newer ones read it."""
_COLUMNS = 24
_HEIGHTS = {"stat": 4, "timeseries": 8, "state-timeline": 8, "table": 8}
_CUSTOM_UNITS = {"nats": "suffix: nats"}


def dashboard() -> dict[str, Any]:
    """All rows, for the runs that are chosen on the page."""
    return {
        "uid": UID,
        "title": "Evermesh",
        "description": "Jobs, their ranks and their nodes.",
        "tags": ["evermesh"],
        "schemaVersion": _SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_runs()]},
        "annotations": {"list": [_restarts()]},
        "panels": list(_panels()),
    }


def _runs() -> dict[str, Any]:
    """What ``$run`` may be."""
    query = "label_values(evermesh_job_info, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "runs"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _restarts() -> dict[str, Any]:
    return {
        "name": "New attempts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": 'changes(evermesh_attempts_total{run=~"$run"}[1m]) > 0',
        "titleFormat": "{{run}}: all workers were started",
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for title, panels in ROWS:
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _at(0, y, 24, 1),
        }
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y, height = 0, y + height, 0
            height = max(height, _HEIGHTS[panel.kind])
            yield _panel(panel, number, _at(x, y, panel.width, _HEIGHTS[panel.kind]))
            number, x = number + 1, x + panel.width
        y += height


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    is_now = panel.kind in ("stat", "table")
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "instant": is_now,
            "range": not is_now,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for index, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat" and panel.unit == "none":  # the value says nothing, the legend does
        return {**_OPTIONS["stat"], "textMode": "name"}
    return _OPTIONS[panel.kind]


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": _CUSTOM_UNITS.get(panel.unit, panel.unit)}
    field |= {name: value for name, value in (("min", panel.least), ("max", panel.most)) if value is not None}
    if panel.kind == "timeseries":
        field["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 25 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
        }
    if panel.kind == "state-timeline":
        field["mappings"] = [
            {
                "type": "value",
                "options": {"0": {"text": " ", "color": "transparent"}, "1": {"text": "now", "color": "green"}},
            }
        ]
    return field


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "value_and_name",
        "colorMode": "none",
        "graphMode": "none",
    },
    "state-timeline": {"showValue": "never", "mergeValues": True, "rowHeight": 0.9},
    "table": {"showHeader": True, "sortBy": [{"displayName": "Value", "desc": True}]},
}
