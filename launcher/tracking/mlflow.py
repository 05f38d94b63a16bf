"""MLflow: metrics of a run, in batches."""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from evermesh.fault.events import Event
from evermesh.launcher.tracking.config import MlflowConfig
from evermesh.launcher.tracking.tracker import Tracked

_MOST = 900
"""Metrics of one request; a server takes 1,000."""
_MOST_PARAMS = 90
_LONGEST = 500
_ENDS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Mlflow:
    """Tells an MLflow server, or writes where MLflow keeps runs without one; see ``Tracker``."""

    def __init__(self, config: MlflowConfig, run: Tracked, key: str | None) -> None:
        self._client = MlflowClient(tracking_uri=config.uri)
        self._waiting: list[Metric] = []
        if key is None:
            key = self._begin(config, run)
        else:
            self._client.update_run(key, status="RUNNING")
        self.key: str = key

    def _begin(self, config: MlflowConfig, run: Tracked) -> str:
        known = self._client.get_experiment_by_name(config.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(config.experiment)
        made = self._client.create_run(experiment, run_name=run.name, tags={"directory": str(run.directory)})
        key = str(made.info.run_id)
        params = [Param(name, str(value)[:_LONGEST]) for name, value in run.settings.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(key, params=params[first : first + _MOST_PARAMS])
        return key

    def step(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        stamp_ms = int(time_s * 1000)
        self._waiting += [Metric(name, value, stamp_ms, step) for name, value in values.items()]

    def event(self, step: int, event: Event) -> None:
        self._waiting.append(Metric(f"events/{event.kind}", 1.0, int(event.time_s * 1000), step))

    def flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self.key, metrics=self._waiting[:_MOST])
            del self._waiting[:_MOST]

    def close(self, state: str) -> None:
        self.flush()
        self._client.set_terminated(self.key, status=_ENDS.get(state, "KILLED"))
