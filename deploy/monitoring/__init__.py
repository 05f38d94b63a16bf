"""What Prometheus and Grafana need to watch jobs: what is scraped, alerts, a dashboard, and how Grafana is given them."""

from evermesh.deploy.monitoring.alerts import ALERTS, Alert, rules
from evermesh.deploy.monitoring.dashboard import dashboard
from evermesh.deploy.monitoring.files import render_monitoring
from evermesh.deploy.monitoring.panels import ROWS, Panel, Query

__all__ = ["ALERTS", "ROWS", "Alert", "Panel", "Query", "dashboard", "render_monitoring", "rules"]
