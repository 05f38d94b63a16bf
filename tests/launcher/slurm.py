"""A Slurm cluster in tests: slurmctld, slurmd and munged of Debian's packages, one node per network namespace.

Needs root, iproute2, util-linux and the packages slurmctld, slurmd, slurm-client and munge; no service of them has to run.
"""

import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launcher.hosts import Host, Hosts, can_make_hosts

_START_WAIT_S = 60.0
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "unshare")
_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
TopologyPlugin=topology/tree
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdTimeout=300
KillWait=30
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Neither cgroups nor PMIx are needed; a job that is put back starts again after seconds (``cred_expire``), not minutes."""


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A cluster whose controller runs on its first node."""

    folder: Path
    hosts: Hosts

    def call(self, *command: str) -> str:
        """What a command of Slurm prints on the first node."""
        done = subprocess.run(
            self.hosts.hosts[0].command(*command),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_WAIT_S,
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def submit(self, script: Path) -> str:
        """Submit a batch script from the folder where it lies; returns the number of the job."""
        told = self.call(
            "sbatch", "--parsable", f"--chdir={script.parent}", f"--output={self.output(script)}", str(script)
        )
        return told.strip()

    def output(self, script: Path) -> Path:
        """What the job of ``script`` has printed, in all its starts."""
        return script.with_suffix(".out")

    def job(self, number: str) -> dict[str, str]:
        """What Slurm tells of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))

    def host_of(self, name: str) -> Host:
        """The host that Slurm calls ``name``."""
        return self.hosts.hosts[int(name.removeprefix("em"))]

    def start(self) -> None:
        """Start all daemons; returns when every node can be used."""
        hosts = self.hosts.hosts
        text = _CONFIGURATION.format(head="em0", address=hosts[0].address, folder=self.folder)
        for number, host in enumerate(hosts):
            text += f"NodeName=em{number} NodeAddr={host.address} CPUs=1 RealMemory=100 State=UNKNOWN\n"
            (self.folder / f"spool-em{number}").mkdir()
        (self.folder / "slurm.conf").write_text(text)
        under = self._under_leaves(len(hosts))
        leaves = [f"SwitchName=leaf{at} Nodes={host}\n" for at, host in enumerate(under)]
        spine = f"SwitchName=spine Switches=leaf[0-{len(under) - 1}]\n"
        (self.folder / "topology.conf").write_text("".join([*leaves, spine]))
        # without it Slurm 22.05 looks for cgroups where a network namespace shows none
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("log", "pid", "seed")]
        self._start(
            0, "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.sock", *files
        )
        _wait(lambda: (self.folder / "munge.sock").exists(), "munged does not listen")
        self._start(0, "slurmctld", "-D")
        for number in range(len(hosts)):
            self._start(number, "slurmd", "-D", "-N", f"em{number}")
        _wait(lambda: self._states() == {"idle"}, f"not all nodes are idle: see {self.folder}/*.log")

    def _under_leaves(self, number: int) -> tuple[str, ...]:
        """The first node has a leaf switch of its own, all others share one."""
        return ("em0", f"em[1-{number - 1}]") if number > 1 else ("em0",)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _states(self) -> set[str]:
        done = subprocess.run(
            self.hosts.hosts[0].command("sinfo", "--noheader", "--Node", "--format", "%T"),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return set(done.stdout.split()) if done.returncode == 0 else set()

    def _start(self, number: int, *command: str) -> None:
        """Start a daemon on a host, which has a name of its own."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"em{number}")
        with (self.folder / f"{command[0]}-{number}.out").open("wb") as output:
            subprocess.Popen(
                self.hosts.hosts[number].command(*named, *command),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def why_no_slurm() -> str:
    """Why no cluster can be made here; empty if one can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return "" if can_make_hosts() else "network namespaces cannot be made here (root and iproute2)"


@contextmanager
def slurm_cluster(number: int) -> Iterator[SlurmCluster]:
    """A cluster of so many nodes; nothing of it is left at the end."""
    hosts = Hosts(number)
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True)
        )
        stack.callback(hosts.remove)
        hosts.make()
        cluster = SlurmCluster(Path(folder), hosts)
        cluster.start()
        yield cluster


def _wait(holds: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + _START_WAIT_S
    while not holds():
        assert time.monotonic() < until, otherwise
        time.sleep(0.1)
