"""The flags of ``evermesh launch SCRIPT``: torchrun's, in torchrun's spelling, and a few words of ours.

Everything up to the script is ours, everything after it belongs to the script. A flag wins over its ``PET_*`` variable.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evermesh.launcher.scripts.errors import ScriptRefused

JOB_FLAGS = ("--set", "--name", "--on", "--spares")
"""What only a job file takes."""
_JOB_FILES = (".yaml", ".yml")
_OFF = ("", "0")
"""Values of a variable that leave a switch off, as torchrun reads them."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. Its variable is ``PET_`` and the first long name in capitals."""

    names: tuple[str, ...]
    """Every spelling with dashes; those with underscores are accepted too."""
    metavar: str | None
    """What its value is called; None for a switch."""
    help: str
    has_effect: bool = True

    @property
    def field(self) -> str:
        long = next(name for name in self.names if name.startswith("--"))
        return long.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return _variable(f"--{self.field}")


def _variable(name: str) -> str:
    """``PET_LOG_DIR`` of ``--log-dir``."""
    return f"PET_{name.removeprefix('--').replace('-', '_').upper()}"


def _idle(name: str, metavar: str | None, why: str) -> Flag:
    """A flag of torchrun's that is accepted and changes nothing."""
    return Flag((name,), metavar, why, has_effect=False)


FLAGS = (
    Flag(("--nnodes", "--nodes"), "N", "nodes; default 1. All on this machine unless --master-addr says otherwise"),
    Flag(("--nproc-per-node", "--workers"), "N|auto|gpu|cpu", "ranks of a node; default 1"),
    Flag(("--node-rank",), "N", "number of this machine; default: as Slurm or Kubernetes say, else as they come"),
    Flag(("--max-restarts",), "N", "how often all ranks are started again after a failure; default 0"),
    Flag(("--module", "-m"), None, "the script is the name of a module, as for python -m"),
    Flag(("--no-python",), None, "the script is a program, not a Python file"),
    Flag(("--run-path",), None, "run the script as a file whatever --no-python says"),
    Flag(("--log-dir",), "DIR", "folder of the logs; default: a new one in the folder of temporary files"),
    Flag(("--redirects", "-r"), "STD", "streams kept off the terminal: 0 to 3, or RANK:STD,..."),
    Flag(("--tee", "-t"), "STD", "streams shown on the terminal: 0 to 3 (1 output, 2 errors), or RANK:STD,..."),
    Flag(("--local-ranks-filter",), "RANK,...", "show these ranks of a node on the terminal; default: its first"),
    Flag(("--shutdown-timeout", "--grace"), "SECONDS", "from SIGTERM or Ctrl-C to SIGKILL; default 25"),
    Flag(("--preflight",), "quick|full|off", "what is looked at while ranks start; full: tests before; default quick"),
    Flag(("--no-record",), None, "do not record the collectives of the ranks (evermesh records)"),
    Flag(("--role",), "NAME", "ROLE_NAME of the ranks"),
    Flag(("--rdzv-id",), "ID", "TORCHELASTIC_RUN_ID; default: a new one"),
    Flag(("--master-addr",), "HOST", "node 0: the machines meet there, and rank 0 opens its store; default localhost"),
    Flag(("--master-port",), "PORT", "its port; default: 29500, and on one machine a new free one for every start"),
    Flag(("--rdzv-backend",), "NAME", "static (default) or c10d; one machine needs none"),
    Flag(("--rdzv-endpoint",), "HOST:PORT", "another way to give --master-addr and --master-port"),
    Flag(("--rdzv-conf",), "KEY=VALUE,...", "join_timeout: seconds in which all machines must come; default 600"),
    Flag(("--standalone",), None, "ignore --rdzv-*, --master-* and schedulers"),
    Flag(("--virtual-local-rank",), None, "every rank sees its own GPU alone, and LOCAL_RANK 0"),
    Flag(("--hostfile", "-H"), "FILE", "machines, each as HOST slots=N; the same command is started on all of them"),
    Flag(("--include", "-i"), "HOST[:SLOT,...]@...", "only these machines and slots of the hostfile"),
    Flag(("--exclude", "-e"), "HOST[:SLOT,...]@...", "all machines and slots but these"),
    _idle("--local-addr", "HOST", "all ranks meet at --master-addr"),
    _idle("--monitor-interval", "SECONDS", "a death is noticed at once"),
    _idle("--start-method", "NAME", "every rank is a fresh process"),
    _idle("--event-log-handler", "NAME", "events are in events.jsonl of the logs"),
    _idle("--signals-to-handle", "NAME,...", "all of them are"),
)

_EVERYWHERE = "Run the same command on every machine (srun, pdsh, Kubernetes), with --nnodes and --master-addr."
FOREIGN = {
    "--num-gpus": "Use --workers.",
    "--num-nodes": "Use --nnodes.",
    "--launcher": _EVERYWHERE,
    "--no-local-rank": "Leave it out: LOCAL_RANK is in the environment, and ${local_rank} in arguments stands for it.",
    "--use-env": "Leave it out: LOCAL_RANK is in the environment.",
    "--num-processes": "Use --workers: ranks of one machine, not of all.",
    "--num-machines": "Use --nnodes.",
    "--machine-rank": "Use --node-rank.",
    "--main-process-ip": "Use --master-addr.",
    "--main-process-port": "Use --master-port.",
}
"""Flags of the launchers of DeepSpeed and Accelerate, and older ones of torch's: what to say here."""
NOT_TAKEN = {
    "--logs-specs": "Logs are files, at --log-dir. Leave it out, and have what reads logs read them there.",
    "--numa-binding": "Ranks inherit the CPUs of the launcher. Leave it out, or bind each rank by a program: --no-python "
    "bind.sh, which runs numactl --cpunodebind for its LOCAL_RANK.",
    "--duplicate-stdout-filters": "Leave it out, and filter the files at --log-dir: grep -E 'apple|orange' stdout.log.",
    "--duplicate-stderr-filters": "Leave it out, and filter the files at --log-dir: grep -E 'apple|orange' stderr.log.",
}
"""Flags of torchrun's that are refused, and the way out."""
HOST_FLAGS = {"hostfile", "include", "exclude"}
"""Fields of DeepSpeed's description of machines."""

HELP = """Any script: evermesh launch [FLAGS] SCRIPT ARGS...

Runs a script that knows nothing of Evermesh, with the environment torchrun would give it.

  evermesh launch --workers 2 train.py --lr 3e-4
  evermesh launch --nproc-per-node gpu --max-restarts 3 -m package.train
  evermesh launch --workers 2 --no-python ./run.sh
  evermesh launch --workers 2 train.py --deepspeed --deepspeed_config ds.json

On several machines, the same on each of them. Machines and their numbers are known with a hostfile, and where Slurm (srun,
one task per node), SkyPilot, PyTorchJob, Volcano or mpirun (one process per machine) has started it:

  evermesh launch --nnodes 2 --node-rank 1 --master-addr node0 --workers 8 --max-restarts 3 train.py
  evermesh launch --hostfile hosts --include worker-0@worker-1:0,2 train.py
  mpirun --map-by ppr:1:node -x MASTER_ADDR=node0 evermesh launch --workers 8 train.py

Each flag may be spelled with underscores and given as a variable, such as PET_NPROC_PER_NODE=2 or PET_MAX_RESTARTS=3;
a flag wins over its variable.

{flags}

Exit codes: 0 done; 1 failed; 2 a wrong request; 75 (requeue me) and 93 (do not) as the script says; 93 also when three
starts in a row made no progress, 75 when a machine was lost; 128 + signal after Ctrl-C or SIGTERM."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Flags and script, as they were typed."""

    values: Mapping[str, str]
    """By field; a switch that is on has ``1``."""
    spellings: Mapping[str, str]
    """By field: the flag or variable that gave the value."""
    script: str | None
    arguments: tuple[str, ...]


def is_script(arguments: Sequence[str]) -> bool:
    """Whether ``evermesh launch ARGUMENTS`` means a script: it is not a job file, and help alone is not one either."""
    for word, flag, _ in _words(arguments):
        if word in ("--help", "-h"):
            return False
        if flag is not None:
            if flag.field in ("module", "no_python"):
                return True
        elif word.startswith("-"):  # a misspelt one: whose it is depends on the company
            return word.split("=")[0] not in JOB_FLAGS and not any(other.endswith(_JOB_FILES) for other in arguments)
        else:
            return not word.endswith(_JOB_FILES)
    return len(arguments) > 0


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether help is asked for before the script; after it, the question is for the script."""
    for word, flag, _ in _words(arguments):
        if flag is None and not word.startswith("-"):
            return False
        if word in ("--help", "-h"):
            return True
    return False


def read(arguments: Sequence[str], environ: Mapping[str, str]) -> CommandLine:
    """Split ``arguments`` into flags and script, and add the variables of ``environ``.

    Raises:
        ScriptRefused: a flag is unknown, lacks its value, or is said twice with different values.
    """
    values, spellings = _from_variables(environ)
    given: dict[str, str] = {}
    script: str | None = None
    rest: tuple[str, ...] = ()
    for word, flag, place in _words(arguments):
        if flag is None and not word.startswith("-"):
            script, rest = word, tuple(arguments[place + 1 :])
            break
        name, value = _value(word, flag, arguments, place)
        assert flag is not None
        if given.get(flag.field, value) != value:
            raise ScriptRefused(f"{spellings[flag.field]} is {given[flag.field]} and {name} is {value}. Give one.")
        given[flag.field] = values[flag.field] = value
        spellings[flag.field] = name
    return CommandLine(values, spellings, script, rest)


def script_help() -> str:
    """What ``evermesh launch SCRIPT`` understands, one flag per line."""
    lines = []
    for flag in FLAGS:
        spelled = f"{', '.join(flag.names)} {flag.metavar or ''}".strip()
        lines.append(f"  {spelled:<42} {flag.help}{'' if flag.has_effect else ' (no effect)'}")
    return HELP.format(flags="\n".join(lines))


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, Flag | None, int]]:
    """The words up to the script with their flag, if they are one, and their place; values of flags are left out."""
    place = 0
    while place < len(arguments):
        word = arguments[place]
        if word == "--" and place + 1 < len(arguments):
            place += 1
            continue
        flag = _KNOWN.get(_dashed(word.split("=")[0]))
        yield word, flag, place
        takes_next = flag is not None and flag.metavar is not None and "=" not in word
        place += 2 if takes_next or word in JOB_FLAGS else 1


def _value(word: str, flag: Flag | None, arguments: Sequence[str], place: int) -> tuple[str, str]:
    """The name of a flag as it was typed, and its value."""
    name, equals, value = word.partition("=")
    if flag is None:
        if _dashed(name) in FOREIGN:
            raise ScriptRefused(f"there is no flag {name}, which is another launcher's. {FOREIGN[_dashed(name)]}")
        if _dashed(name) in NOT_TAKEN:
            raise ScriptRefused(f"{name}, a flag of torchrun's, is not supported. {NOT_TAKEN[_dashed(name)]}")
        close = difflib.get_close_matches(_dashed(name), _KNOWN, n=1, cutoff=0.5)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ScriptRefused(f"there is no flag {name}.{guess} What belongs to the script comes after it.")
    if flag.metavar is None:
        if equals:
            raise ScriptRefused(f"{name} takes no value.")
        return name, "1"
    if equals:
        return name, value
    if place + 1 == len(arguments):
        raise ScriptRefused(f"{name} needs a value: {name} {flag.metavar}.")
    return name, arguments[place + 1]


def _from_variables(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Values and spellings that ``PET_*`` variables give."""
    values: dict[str, str] = {}
    for flag in FLAGS:
        value = environ.get(flag.variable)
        if value is not None and not (flag.metavar is None and value in _OFF):
            values[flag.field] = value
    for name, way_out in NOT_TAKEN.items():
        variable = _variable(name)
        if environ.get(variable):
            raise ScriptRefused(f"{variable} is set, but {name} of torchrun's is not supported. {way_out}")
    return values, {field: f"PET_{field.upper()}" for field in values}


def _dashed(name: str) -> str:
    return name if not name.startswith("--") else "--" + name[2:].replace("_", "-")


_KNOWN = {name: flag for flag in FLAGS for name in flag.names}
