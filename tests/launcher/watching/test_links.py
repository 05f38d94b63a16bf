"""A job on three hosts with addresses of their own: a way that lets nothing pass is named, and no rank instead of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evermesh.fault.events import Finding, read_events
from tests.fault.suite.links import lose
from tests.launcher.jobs import Job, launched

pytest.importorskip("ray")
from tests.launcher.hosts import Host, Hosts, can_make_hosts, on, ray_hosts

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces cannot be made here (root and iproute2)"),
]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ray_hosts(3) as made:
        yield made


def _findings(job: Job) -> list[Finding]:
    events = read_events(job.run.events) if job.run.events.is_file() else ()
    return [Finding.model_validate(event.fields["finding"]) for event in events if event.kind == "finding"]


def _ranks_of(job: Job, host: Host) -> set[int]:
    pids = {process.pid for process in host.processes}
    return {rank for rank, pid in job.pids.items() if pid in pids}


def test_a_way_that_lets_nothing_pass_is_named_while_the_job_hangs(hosts: Hosts, job_file: Path) -> None:
    settings = (
        "train.steps=100000",
        "nodes=3",
        "workers=3",
        "train.checkpoint.every=null",
        "train.snapshot=off",
        "restarts=0",
    )
    head, one, other = hosts.hosts
    with launched(job_file, *settings, "hang.idle_s=30", on(hosts), within=head.command()) as job:
        job.wait(job.has_trained, 120.0)
        job.wait(lambda: len(job.losses) > 20, 120.0)
        assert not [finding for finding in _findings(job) if finding.kind == "communication hang"]
        [rank], [other_rank] = _ranks_of(job, one), _ranks_of(job, other)
        lose(one, other)
        job.wait(lambda: any(finding.link is not None for finding in _findings(job)), 60.0)
        finding = next(finding for finding in _findings(job) if finding.link is not None)
        assert (finding.kind, finding.link) == ("communication hang", (min(rank, other_rank), max(rank, other_rank)))
        assert (
            f"does not arrive at rank {other_rank}" in finding.text or f"does not arrive at rank {rank}" in finding.text
        )
        assert not [found for found in _findings(job) if found.kind == "hang"], "no rank is blamed"
        failed = lambda: [event for event in read_events(job.run.events) if event.kind == "failed"]  # noqa: E731
        job.wait(lambda: bool(failed()), 90.0)
        assert finding.text.split(",")[0] in failed()[0].text
        assert f"as does rank {max(rank, other_rank)}" in failed()[0].text
