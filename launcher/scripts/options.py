"""What to run and how, checked once at the door; imports no torch."""

import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Annotated, Literal

from pydantic import Field

from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import FLAGS, HOST_FLAGS, CommandLine, read
from evermesh.launcher.scripts.schedulers import Told, told_by_scheduler
from evermesh.launcher.scripts.values import Frozen, seconds, whole_number
from evermesh.launcher.scripts.where import Machines, ThisMachine, find_place

Preflight = Literal["off", "quick", "full"]
Std = Literal[0, 1, 2, 3]
"""A set of streams: 1 is standard output, 2 standard error, as torchrun counts them."""
_DEFAULT_GRACE_S = 25.0


class PythonFile(Frozen):
    """A Python file."""

    kind: Literal["file"] = "file"
    path: str


class PythonModule(Frozen):
    """A module, run as ``python -m`` does."""

    kind: Literal["module"] = "module"
    name: str


class Program(Frozen):
    """Any program."""

    kind: Literal["program"] = "program"
    path: str


class ScriptJob(Frozen):
    """A script, its ranks, and what becomes of their output and their failures."""

    script: Annotated[PythonFile | PythonModule | Program, Field(discriminator="kind")]
    arguments: tuple[str, ...] = ()
    """``${local_rank}`` in them stands for the local rank."""
    workers: int = Field(default=1, ge=1)
    """Number of ranks of a node."""
    where: Annotated[ThisMachine | Machines, Field(discriminator="kind")] = ThisMachine()
    max_restarts: int = Field(default=0, ge=0)
    run_id: str
    role: str = "default"
    log_dir: Path | None = None
    """None for a new folder among the temporary files."""
    redirects: tuple[Std, ...]
    """Per local rank: streams kept off the terminal."""
    tee: tuple[Std, ...]
    """Per local rank: streams shown on the terminal, whatever ``redirects`` says."""
    local_ranks_filter: tuple[int, ...] | None = None
    """Local ranks that may show anything; None for the first rank of this machine and what ``tee`` names."""
    grace_s: float = Field(default=_DEFAULT_GRACE_S, ge=0)
    """Seconds from a signal that ends the job to SIGKILL."""
    preflight: Preflight = "quick"
    """How the machine is looked at before it may train."""
    slots: tuple[int, ...] | None = None
    """GPUs of this machine that ranks may see; None: those that the launcher sees."""
    virtual_local_rank: bool = False
    """Every rank sees its own GPU alone, as number 0."""
    records: bool = True
    """Ranks record their collectives."""
    idle_flags: tuple[str, ...] = ()
    """What was given and has no effect here."""

    @property
    def name(self) -> str:
        """What to call the script."""
        return self.script.name if isinstance(self.script, PythonModule) else Path(self.script.path).name

    def command(self, local_rank: int) -> list[str]:
        """The command line of one rank."""
        python = [os.environ.get("PYTHON_EXEC", sys.executable), "-u"]
        arguments = [Template(argument).safe_substitute(local_rank=local_rank) for argument in self.arguments]
        if isinstance(self.script, PythonModule):
            return [*python, "-m", self.script.name, *arguments]
        if isinstance(self.script, PythonFile):
            return [*python, self.script.path, *arguments]
        return [self.script.path, *arguments]

    def shows(self, local_rank: int, stream: Literal[1, 2], *, on_first_node: bool = True) -> bool:
        """Whether a stream of a rank is copied to the terminal; ``on_first_node``: of those on this machine."""
        if self.local_ranks_filter is not None and local_rank not in self.local_ranks_filter:
            return False
        if self.tee[local_rank] & stream:
            return True
        is_first = local_rank == 0 and on_first_node
        return not self.redirects[local_rank] & stream and (is_first or self.local_ranks_filter is not None)


def script_job(arguments: Sequence[str], environ: Mapping[str, str]) -> ScriptJob:
    """The job that a command line and ``PET_*`` variables describe.

    Raises:
        ScriptRefused: something in them is wrong; says what and what is allowed.
    """
    line = read(arguments, environ)
    told = _told(line, environ)
    workers = _count_ranks(line, told)
    log_dir = line.values.get("log_dir")
    _check_visible(line, told, workers, environ)
    return ScriptJob(
        script=_script(line),
        arguments=line.arguments,
        workers=workers,
        where=find_place(line, told),
        max_restarts=whole_number(line, "max_restarts", 0),
        run_id=_run_id(line),
        role=line.values.get("role", "default"),
        log_dir=Path(log_dir) if log_dir else None,
        redirects=_streams(line, "redirects", workers),
        tee=_streams(line, "tee", workers),
        local_ranks_filter=_filter(line),
        slots=told.slots,
        virtual_local_rank="virtual_local_rank" in line.values,
        preflight=_preflight(line),
        records="no_record" not in line.values,
        grace_s=seconds(line, "shutdown_timeout", _DEFAULT_GRACE_S),
        idle_flags=tuple(line.spellings[f.field] for f in FLAGS if not f.has_effect and f.field in line.values),
    )


def _preflight(line: CommandLine) -> Preflight:
    found: dict[str, Preflight] = {"off": "off", "quick": "quick", "full": "full"}
    text = line.values.get("preflight", "quick")
    if text not in found:
        raise ScriptRefused(f"{line.spellings['preflight']} is {text!r}. Give off, quick or full.")
    return found[text]


def _told(line: CommandLine, environ: Mapping[str, str]) -> Told:
    """What a hostfile, or else the scheduler that started this launcher, says of the machines of the job."""
    if "standalone" in line.values:
        return Told()
    if HOST_FLAGS & line.values.keys():
        from evermesh.launcher.scripts.hostfile import told_by_hostfile  # few jobs have one

        return told_by_hostfile(line)
    return told_by_scheduler(environ)


def _check_visible(line: CommandLine, told: Told, workers: int, environ: Mapping[str, str]) -> None:
    """Refuse slots, or GPUs of ranks, beyond those that are visible."""
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    wanted = max(told.slots or (0,), default=0) + 1
    if "virtual_local_rank" in line.values:
        wanted = max(wanted, workers)
    if visible and wanted > len(visible):
        raise ScriptRefused(
            f"GPU {wanted - 1} of this machine is asked for, but CUDA_VISIBLE_DEVICES={','.join(visible)} leaves "
            f"{len(visible)}. Ask for fewer, or unset it."
        )


def _script(line: CommandLine) -> PythonFile | PythonModule | Program:
    if line.script is None:
        raise ScriptRefused("there is no script. Give one: evermesh launch [FLAGS] train.py ARGS...")
    is_program = "no_python" in line.values and "run_path" not in line.values
    if "module" in line.values:
        if is_program:
            raise ScriptRefused("--module and --no-python exclude each other: a module is run by Python. Give one.")
        return PythonModule(name=line.script)
    if is_program:
        if shutil.which(line.script) is None:
            raise ScriptRefused(f"there is no program {line.script}, or it may not be executed. Check path and mode.")
        return Program(path=line.script)
    if not Path(line.script).exists():
        raise ScriptRefused(f"there is no file {line.script}. A module needs -m, another program --no-python.")
    return PythonFile(path=line.script)


def _count_ranks(line: CommandLine, told: Told) -> int:
    if "nproc_per_node" not in line.values and told.workers is not None:
        return told.workers
    text = line.values.get("nproc_per_node", "1")
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    spelling = line.spellings["nproc_per_node"]
    if text not in ("auto", "gpu", "cpu"):
        raise ScriptRefused(f"{spelling} is {text!r}. Give a number from 1, auto, gpu or cpu.")
    gpus = _count_gpus()
    if text == "gpu" and not gpus:
        raise ScriptRefused(f"{spelling} is gpu, but no NVIDIA device is visible here. Give a number, or cpu.")
    return gpus if gpus and text != "cpu" else len(os.sched_getaffinity(0))


def _count_gpus() -> int:
    """NVIDIA devices that a rank would see; asks the file system, because torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    if visible is None or not devices:
        return devices
    wanted = [name for name in visible.split(",") if name]
    return wanted.index("-1") if "-1" in wanted else len(wanted)


def _run_id(line: CommandLine) -> str:
    wanted = line.values.get("rdzv_id", "none")
    run_id = str(uuid.uuid4()) if "standalone" in line.values or wanted == "none" else wanted
    if "/" in run_id or run_id in (".", ".."):
        raise ScriptRefused(f"{line.spellings['rdzv_id']} is {run_id!r}, which cannot name a folder. Leave out the /.")
    return run_id


def _filter(line: CommandLine) -> tuple[int, ...] | None:
    text = line.values.get("local_ranks_filter", "")
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise ScriptRefused(f"{line.spellings['local_ranks_filter']} is {text!r}. Give ranks, such as 0,1,2.")
    return tuple(map(int, text.split(","))) if text else None


def _streams(line: CommandLine, field: str, workers: int) -> tuple[Std, ...]:
    """``3``, or ``0:1,1:2``, for every rank."""
    text = line.values.get(field, "0")
    if re.fullmatch(r"[0-3]", text):
        return (_std(text),) * workers
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ScriptRefused(
            f"{line.spellings[field]} is {text!r}. Give 0 to 3 (1 is output, 2 errors, 3 both), or RANK:STD,RANK:STD."
        )
    pairs = dict(pair.split(":") for pair in text.split(","))
    return tuple(_std(pairs.get(str(rank), "0")) for rank in range(workers))


def _std(text: str) -> Std:
    streams: dict[str, Std] = {"0": 0, "1": 1, "2": 2, "3": 3}
    return streams[text]
