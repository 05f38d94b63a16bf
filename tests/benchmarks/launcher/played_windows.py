"""What agents of a large job tell of the records of their ranks: summaries as real ones are made and packed, of played ranks.

The records are those of a small job without faults, in the groups of the large one, as if they had just been written.
"""

import time
from dataclasses import replace

import numpy as np
from pydantic import TypeAdapter

from evermesh.fault.detectors.summaries import RankSummary, RankWatch
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.record import Group
from evermesh.fault.synthetic import JobShape, generate
from evermesh.launcher import Run
from evermesh.launcher.watching.messages import PackedGroup, PackedSummary
from evermesh.launcher.watching.packing import pack_summary

_TP = 8
_RANK = 987_654
"""In the place of the rank, in texts that serve all ranks with the same place in their group."""
_STATE = ProcessState("R", 3, False)
_STEPS = 3
"""In a window: of a job that is so large a window lasts three seconds, and a step hardly less than one."""
_RANKS_PER_S = 4096
_LEAST_S = 0.5
_SUMMARY = TypeAdapter(PackedSummary)


class PlayedWindows:
    """Of one run, on nodes of eight ranks; told ``slower`` times as rarely as by real agents."""

    def __init__(self, run: Run, slower: float) -> None:
        self.slower = slower
        self._ranks = run.config().workers
        self.every_s = slower * max(_LEAST_S, self._ranks / _RANKS_PER_S)
        traces = generate(JobShape(dp=2, tp=_TP, steps=_STEPS)).traces[:_TP]
        self._summaries = [RankWatch().summarise(trace) for trace in traces]
        self._newest_ns = max(int(one.tail.records["ended_ns"].max()) for one in self._summaries)
        self._texts: tuple[int, list[str]] = (-1, [])

    def text(self, generation: int, ranks: range, said: int) -> str:
        """The ``said``-th window of a node with these ranks, as JSON; it names groups as often as real ones do."""
        if self._texts[0] != said:
            self._texts = (said, [self._text(one) for one in self._summaries])
        told = [self._of(rank, self._texts[1][rank % _TP], with_groups=said % 20 == 0) for rank in ranks]
        return f'{{"kind":"window","generation":{generation},"summaries":[{",".join(told)}]}}'

    def _text(self, summary: RankSummary) -> str:
        """As of now, without groups."""
        shift_ns = time.monotonic_ns() - self._newest_ns
        tail = summary.tail
        records = tail.records.copy()
        for moment in ("entered_ns", "ended_ns"):
            records[moment] = np.where(records[moment] > 0, records[moment] + shift_ns, 0)
        now = replace(tail, rank=_RANK, pid=_RANK, records=records, read_ns=time.monotonic_ns())
        packed = pack_summary(replace(summary, tail=now), _STATE, with_groups=False)
        return _SUMMARY.dump_json(packed).decode()

    def _of(self, rank: int, text: str, *, with_groups: bool) -> str:
        named = text.replace(f'"rank":{_RANK},"pid":{_RANK}', f'"rank":{rank},"pid":{5000 + rank}', 1)
        if with_groups:
            told = ",".join(one.model_dump_json() for one in self._groups(rank))
            named = named.replace('"groups":null', f'"groups":[{told}]', 1)
        assert named != text, "a summary has another form than expected"
        return named

    def _groups(self, rank: int) -> list[PackedGroup]:
        found = self._summaries[rank % _TP].tail.groups
        return [self._group(index, group, rank) for index, group in sorted(found.items())]

    def _group(self, index: int, group: Group, rank: int) -> PackedGroup:
        if group.axis == "tp":
            first = rank - rank % _TP
            return PackedGroup(index=index, name=f"tp{first // _TP}", ranks=((first, first + _TP, 1),), axis="tp")
        if group.axis == "dp":
            place = rank % _TP
            return PackedGroup(index=index, name=f"dp{place}", ranks=((place, self._ranks, _TP),), axis="dp")
        return PackedGroup(index=index, name=group.name, ranks=((0, self._ranks, 1),), axis=group.axis)
