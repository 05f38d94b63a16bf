"""What NCCL's flight recorder would dump of a synthetic job: format 2.10, from its description."""

from typing import Any

from evermesh.fault.recorder.record import DTYPES, OPERATIONS
from evermesh.fault.recorder.trace import RankTrace

_TORCH_NAMES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "uint8": "Byte"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


def nccl_dump(trace: RankTrace) -> dict[str, Any]:
    """The dump of one rank, as it is pickled; JSON has lists for tuples."""
    config = {
        str(local): {"name": str(local), "desc": group.name, "ranks": str(list(group.ranks))}
        for local, group in trace.groups.items()
    }
    return {
        "version": "2.10",
        "nccl_version": "2.27.5",
        "pg_config": config,
        "pg_status": {},
        "entries": [_entry(trace, index) for index in range(len(trace.records))],
        "nccl_comm_state": {},
    }


def _entry(trace: RankTrace, index: int) -> dict[str, Any]:
    record = trace.records[index]
    operation, dtype = OPERATIONS[record["operation"]], DTYPES[record["dtype"]]
    group, is_message = int(record["group"]), operation in ("send", "receive")
    ours, peer = trace.groups[group].ranks.index(trace.rank), int(record["peer"])
    name = f"nccl:{operation}"
    if is_message:
        name = f"nccl:send {ours}->{peer}" if operation == "send" else f"nccl:recv {ours}<-{peer}"
    started, ended = int(record["entered_ns"]), int(record["ended_ns"])
    return {
        "frames": [{"name": "train", "filename": "/job/train.py", "line": 7}],
        "record_id": index,
        "pg_id": group,
        "process_group": (str(group), trace.groups[group].name),
        "collective_seq_id": 0 if is_message else int(record["number"]) + 1,
        "p2p_seq_id": int(record["number"]) + 1 if is_message else 0,
        "op_id": index + 1,
        "profiling_name": name,
        "time_created_ns": started + trace.wall_offset_ns,
        "input_sizes": ((int(record["num_bytes"]) // _BYTES[dtype],),),
        "input_dtypes": (_TORCH_NAMES[dtype],),
        "output_sizes": ((int(record["num_bytes"]) // _BYTES[dtype],),),
        "output_dtypes": (_TORCH_NAMES[dtype],),
        "state": "completed" if ended else "started",
        "time_discovered_started_ns": started + trace.wall_offset_ns,
        "time_discovered_completed_ns": ended + trace.wall_offset_ns if ended else None,
        "retired": bool(ended),
        "timeout_ms": 600_000,
        "is_p2p": is_message,
    }
