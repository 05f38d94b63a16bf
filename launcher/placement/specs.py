"""What an agent is started with, wherever its node is."""

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.config import JobConfig
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import journal_folder
from evermesh.runtime.config import CpuDevice

_WARM_MODULE = "evermesh.launcher.agent.training"


def spec_of(
    run: Run, config: JobConfig, node: str, address: str = "", *, revives: bool = False, is_head: bool = False
) -> AgentSpec:
    """The agent of ``node``; the rest as in ``AgentSpec``. Without an ``address`` it is known where the agent runs."""
    device = config.train.device
    return AgentSpec(
        run=run.directory.absolute(),
        node=node,
        address=address,
        slots=config.workers // config.nodes,
        warm_module=_WARM_MODULE,
        threads=device.threads if isinstance(device, CpuDevice) else 1,
        revives=revives,
        is_head=is_head,
        journal_folder=journal_folder(run, config, node),
        metrics=config.metrics,
        metrics_host=(config.api.host or "") if config.on == "local" else "",
        preflight=config.preflight,
        health_every_s=config.health_every_s,
    )
