"""``python -m evermesh.launcher.controller RUN``: the controller of a run as a process of this machine."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evermesh.launcher import registry
from evermesh.launcher.contact import last_port, make_token, write_contact
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.errors import LauncherError, RunAlive
from evermesh.launcher.patient_output import outlive_a_full_disk
from evermesh.launcher.placement import placement_for
from evermesh.launcher.run_directory import Run, now

if TYPE_CHECKING:
    import uvicorn

_PING_S = 1.0


def main() -> None:
    """Control the run; a second controller ends at once."""
    outlive_a_full_disk()
    run = Run(Path(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGHUP):  # they belong to whoever shows the job
        signal.signal(number, signal.SIG_IGN)
    try:
        with (
            run.locked(),
            registry.register("run", run.name, run.directory.absolute()),
            Journal(run.journal) as journal,
        ):
            sys.exit(asyncio.run(_control(run, journal)))
    except RunAlive as error:
        print(error, flush=True)


async def _control(run: Run, journal: Journal) -> int:
    config, token = run.config(), make_token(run.directory)
    try:
        placement = placement_for(run, config, token)
    except LauncherError as error:
        return _refuse(run, error)
    listener = _listen(placement.address, last_port(run.directory))
    host, port = listener.getsockname()[:2]
    write_contact(run.directory, f"http://{host}:{port}")
    controller = Controller(run, config, journal, placement)  # starts agents, which load torch meanwhile
    from evermesh.launcher.controller.api import make_app

    server = _server(make_app(controller, token))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(
        signal.SIGTERM, lambda: controller.stop(signal.SIGTERM, at_once=False, grace_s=config.grace_s)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        return await controller.serve()
    finally:
        server.should_exit = True
        await serving


def _refuse(run: Run, error: LauncherError) -> int:
    """The job cannot begin; one that is running already goes on, and whoever started this controller tries again."""
    print(error, flush=True)
    state = run.state()
    if state.state != "running":
        run.write_state(
            state.model_copy(
                update={"state": "failed", "error": str(error), "exit_code": error.exit_code, "ended": now()}
            )
        )
    return error.exit_code


def _listen(host: str, wanted: int | None) -> socket.socket:
    """A listening socket, on the port of the last controller if that is free."""
    for port in (wanted or 0, 0):
        with contextlib.suppress(OSError):
            return socket.create_server((host, port), backlog=4096)
    raise OSError(f"no port of {host} can be opened")


def _server(app: object) -> "uvicorn.Server":
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are ours

    return Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_level="warning",
            lifespan="off",
            ws_ping_interval=_PING_S,
            ws_ping_timeout=2 * _PING_S,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
    )


if __name__ == "__main__":
    main()
