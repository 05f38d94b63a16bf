"""``python -m evermesh.launcher.controller RUN [MANDATE]``: the controller of a run as a process of this machine.

With a mandate (JSON) it takes over from a controller whose node was lost.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evermesh.launcher import registry
from evermesh.launcher.config import JobConfig
from evermesh.launcher.contact import last_port, make_token, write_contact
from evermesh.launcher.controller.collecting import spare_collections
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.journal import (
    Journal,
    journal_lines,
    launch_number,
    read_journal,
    restore_journal,
)
from evermesh.launcher.controller.limit import stop_in_time
from evermesh.launcher.controller.listening import listen, places
from evermesh.launcher.controller.record import replay
from evermesh.launcher.controller.submission import stop_with_submission
from evermesh.launcher.errors import LauncherError, RunAlive, Superseded
from evermesh.launcher.patient_output import outlive_a_full_disk
from evermesh.launcher.placement import Placement, placement_for
from evermesh.launcher.run_directory import Run, now
from evermesh.launcher.succession.copy import read_copy
from evermesh.launcher.succession.office import (
    Mandate,
    Office,
    can_be_succeeded,
    elected_views,
    first_views,
    take_office,
    views_again,
)

if TYPE_CHECKING:
    import uvicorn

_PING_S = 1.0


def main() -> None:
    """Control the run; a second controller ends at once."""
    outlive_a_full_disk()
    run = Run(Path(sys.argv[1]))
    mandate = Mandate.model_validate_json(sys.argv[2]) if len(sys.argv) > 2 else None
    for number in (signal.SIGINT, signal.SIGHUP):  # they belong to whoever shows the job
        signal.signal(number, signal.SIG_IGN)
    try:
        with (
            run.locked() if mandate is None else contextlib.nullcontext(_nothing) as check_lock,
            registry.register("run", run.name, run.directory.absolute()),
        ):
            sys.exit(asyncio.run(_control(run, mandate, check_lock)))
    except RunAlive as error:
        print(error, flush=True)


async def _control(run: Run, mandate: Mandate | None, check_lock: Callable[[], None]) -> int:
    config, again = run.config(), run.state().state == "running"
    try:
        token = make_token(run.directory, None if again else config.api.token_file)  # agents that live know the old one
        placement = placement_for(run, config, token)
        listener = listen(places(config.api, placement.address, last_port(run.directory), again=again))
        host, port = listener.getsockname()[:2]
        url = f"http://{host}:{port}"
        lines = journal_lines(run.journal) if mandate is None else read_copy(mandate.copy_path)
        office = _office(run, config, lines, token, url, mandate)
        check_lock()  # whoever was elected took the lock before it wrote its term into the journal, which was read just now
    except LauncherError as error:
        return _refuse(run, error)
    with contextlib.ExitStack() as stack:
        if mandate is not None:  # all that follows replaces what the controller before has written
            stack.enter_context(run.taken_over())
            restore_journal(run.journal, lines)
        journal = stack.enter_context(Journal(run.journal, office))
        write_contact(run.directory, url)
        controller = Controller(run, config, journal, placement, office)  # starts agents, which load torch meanwhile
        return await _serve(controller, placement, config, listener, token)


async def _serve(
    controller: Controller, placement: Placement, config: JobConfig, listener: socket.socket, token: str
) -> int:
    from evermesh.launcher.controller.api import make_app
    from evermesh.launcher.controller.targets import TargetsFile

    server = _server(make_app(controller, token))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(
        signal.SIGTERM, lambda: controller.stop(signal.SIGTERM, at_once=False, grace_s=config.grace_s)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    targets = TargetsFile(controller.run, config.api)
    minding = [
        asyncio.create_task(stop_in_time(controller, placement, config.grace_s)),
        asyncio.create_task(stop_with_submission(controller, config.grace_s)),
        asyncio.create_task(targets.follow(controller)),
        asyncio.create_task(spare_collections(controller)),
    ]
    try:
        return await controller.serve()
    finally:
        for task in minding:
            task.cancel()
        targets.end(controller)
        server.should_exit = True
        await serving


def _office(
    run: Run, config: JobConfig, lines: Sequence[str], token: str, url: str, mandate: Mandate | None
) -> Office | None:
    """The term of this controller, in force when this returns; None: the job has too few nodes for another to take over.

    Raises:
        LauncherError: it must not go on.
    """
    if not can_be_succeeded(config.nodes + config.spares, config.journal_copies):
        return None
    if mandate is not None:
        views = elected_views(mandate, url)
    elif run.state().state == "running":
        entries = read_journal(run.journal)
        views = views_again(run.directory, launch_number(entries), replay(entries).term, url)
    else:
        views = first_views(len(lines) + 1, url)
    office = take_office(run.directory, views, lines, token, copies=config.journal_copies, superseded=_end_at_once)
    if mandate is not None:
        office.begin()
    return office


def _nothing() -> None:
    """An elected controller takes the lock when it is in office."""


def _end_at_once(error: Superseded) -> None:
    """Nothing of what it was about to do is done, its agents are not told to leave: they are another controller's."""
    print(error, flush=True)
    os._exit(error.exit_code)


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
            ws_per_message_deflate=False,  # it would keep a quarter of a megabyte for each agent
            timeout_graceful_shutdown=1,
            server_header=False,
        )
    )


if __name__ == "__main__":
    main()
