"""All commands of ``evermesh``, as typer reads them."""

from typing import Annotated

import typer

from evermesh.launcher.commands import (
    chaos,
    checkpoint,
    data,
    demo,
    deploy,
    diagnose,
    doctor,
    export,
    jobs,
    layout,
    metrics,
    nodes,
    plan,
    records,
    report,
    simulate,
    snapshot,
    track,
    traffic,
    watching,
)

app = typer.Typer(
    name="evermesh",
    help="Launch, resume and monitor distributed training of large language models, with a parallel plan per batch.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="[bold]Start here[/]\n\n  evermesh demo\n\n  evermesh launch deploy/jobs/quickstart.yaml\n\n"
    "  evermesh resume --workers 3\n\n  evermesh runs",
)
app.command("launch", epilog=jobs.LAUNCH_EXAMPLES)(jobs.launch)
app.command("resume", epilog=jobs.RESUME_EXAMPLES)(jobs.resume)
app.command("runs", epilog=jobs.RUNS_EXAMPLES)(jobs.list_runs)
app.command("status", epilog=watching.STATUS_EXAMPLES)(watching.status)
app.command("top", epilog=watching.TOP_EXAMPLES)(watching.top)
app.command("logs", epilog=watching.LOGS_EXAMPLES)(watching.logs)
app.command("records", epilog=records.EXAMPLES)(records.records)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("track", epilog=track.EXAMPLES)(track.track)
app.command("metrics", epilog=metrics.EXAMPLES)(metrics.metrics)
app.command("nodes", epilog=nodes.NODES_EXAMPLES)(nodes.nodes)
app.command("cordon", epilog=nodes.CORDON_EXAMPLES)(nodes.cordon)
app.command("uncordon", epilog=nodes.UNCORDON_EXAMPLES)(nodes.uncordon)
app.command("drain", epilog=nodes.DRAIN_EXAMPLES)(nodes.drain)
app.command("dashboard", epilog=watching.DASHBOARD_EXAMPLES)(watching.dashboard)
app.command("relayout", epilog=watching.RELAYOUT_EXAMPLES)(watching.relayout)
app.command("stop", epilog=watching.STOP_EXAMPLES)(watching.stop)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("simulate", epilog=simulate.EXAMPLES)(simulate.simulate)
app.command("layout", epilog=layout.EXAMPLES)(layout.layout)
app.add_typer(checkpoint.app)
app.add_typer(snapshot.app)
app.add_typer(traffic.app)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.add_typer(data.app)
app.add_typer(deploy.app)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("diagnose", epilog=diagnose.EXAMPLES)(diagnose.diagnose)
app.command("chaos", epilog=chaos.EXAMPLES)(chaos.chaos)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from evermesh import __version__

        print(f"evermesh {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
