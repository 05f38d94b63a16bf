"""Checks what ranks compute and hold at intervals; what is wrong becomes a finding that every rank knows of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from pydantic import JsonValue

from evermesh.fault.events import Finding
from evermesh.runtime.errors import CorruptionFound
from evermesh.runtime.guard.config import GuardConfig, ProbePolicy, ReplicaPolicy
from evermesh.runtime.guard.probe import BlockProbe, Probed
from evermesh.runtime.guard.replicas import Disagreement, disagreements, replicas_of
from evermesh.runtime.model.building import BuiltModel
from evermesh.runtime.process_group import Groups

COMPUTED, HELD = "silent corruption", "replicas differ"
"""Kinds of findings."""
_SURE, _PERHAPS, _HARDLY = 0.95, 0.5, 0.05


class Integrity:
    """The checks of one rank in one layout. All ranks make one and check the same steps.

    Args:
        config: when, and what follows.
        built: this rank's model.
        groups: of this layout.
    """

    def __init__(self, config: GuardConfig, built: BuiltModel, groups: Groups) -> None:
        self._config, self._built, self._groups = config, built, groups
        self._probe = BlockProbe(built, groups.moment) if config.probe is not None else None

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around the computation of a step. Collective as that is."""
        policy = self._config.probe
        if self._probe is None or not _is_due(policy, step):
            yield
            return
        assert policy is not None
        with self._probe.watching(step // policy.every):
            yield

    def findings(self, step: int) -> list[Finding]:
        """What is wrong in ``step``, between its computation and its update; the same on every rank. Collective, in steps in
        which something is checked."""
        found: list[Finding] = []
        moment = self._groups.moment
        before, moment.phase = moment.phase, "probe"
        if self._probe is not None and _is_due(self._config.probe, step):
            found += self._of_probe(self._probed(self._probe.take()))
        if _is_due(self._config.replicas, step):
            own = replicas_of(self._built.sets, self._groups.place.pp)
            differing = disagreements(own, self._groups.world, self._device)
            found += [_of_copy(rank, of) for of in differing for rank in of.suspects]
        moment.phase = before
        return found

    def suspicion(self, found: Sequence[Finding]) -> str | None:
        """Why the update of the step with these findings is not to be made; None: it may be. Collective; rank 0 has written
        down what was found.

        Raises:
            CorruptionFound: the configuration says that such a run ends.
        """
        probe, replicas = self._config.probe, self._config.replicas
        policies = {
            COMPUTED: probe.on_mismatch if probe is not None else "continue",
            HELD: replicas.on_mismatch if replicas is not None else "continue",
        }
        stops = [finding for finding in found if policies[finding.kind] == "stop"]
        if stops:
            # the first to raise ends the others, also rank 0 that writes
            self._groups.world.all_reduce(torch.zeros(1, device=self._device), "probe")
            raise CorruptionFound(
                f"{'; '.join(describe(finding) for finding in stops)}. Test the memory and the processors of these ranks, "
                "and resume without them."
            )
        return next((describe(finding) for finding in found if policies[finding.kind] == "skip"), None)

    def _probed(self, own: Probed) -> dict[int, Probed]:
        """What the ranks whose results differ have found. Collective: one sum of 32 bytes per rank."""
        world = self._groups.world
        table = torch.zeros(world.size, len(own), dtype=torch.int64, device=self._device)
        table[world.rank] = torch.tensor(own)
        world.all_reduce(table, "probe")
        of_ranks = [Probed(*row) for row in table.tolist()]
        return {rank: probed for rank, probed in enumerate(of_ranks) if probed.differing}

    def _of_probe(self, found: Mapping[int, Probed]) -> list[Finding]:
        """One for every rank with other bits, first those where they begin to differ first. What a rank sends to a ring, or
        to those that share its model, gives them other bits too, from there on."""
        repeats = self._device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        sure = _SURE if repeats else _PERHAPS  # kernels may add in another order every time
        first = {layer: min(of.place for of in found.values() if of.layer == layer) for layer in _layers(found)}
        suspects = [rank for rank, of in found.items() if of.place == first[of.layer]]
        return [
            Finding(
                kind=COMPUTED,
                rank=rank,
                evidence={
                    "layer": of.layer,
                    "differing_elements": of.differing,
                    "compared_elements": of.compared,
                    "first_differing_tensor": of.place,
                    "suspects": list[JsonValue](suspects),
                },
                confidence=sure / len(suspects) if rank in suspects else _HARDLY,
            )
            for rank, of in sorted(found.items(), key=lambda item: item[0] not in suspects)
        ]

    @property
    def _device(self) -> torch.device:
        return next(self._built.model.parameters()).device


def _layers(found: Mapping[int, Probed]) -> set[int]:
    return {of.layer for of in found.values()}


def describe(finding: Finding) -> str:
    """A finding of this module in a sentence."""
    numbers = finding.evidence
    if finding.kind == COMPUTED:
        return (
            f"rank {finding.rank} computed layer {numbers['layer']} twice, and {numbers['differing_elements']:,} of "
            f"{numbers['compared_elements']:,} elements differ"
        )
    return (
        f"rank {finding.rank} holds other bits of the parameters ({numbers['replica']}) than others of the ranks "
        f"{numbers['holders']}"
    )


def _of_copy(rank: int, of: Disagreement) -> Finding:
    alone = len(of.suspects) < len(of.holders)  # else nobody knows which of them are right
    return Finding(
        kind=HELD,
        rank=rank,
        evidence={"replica": of.name, "holders": list(of.holders), "suspects": list(of.suspects)},
        confidence=_SURE if alone else 1 / len(of.suspects),
    )


def _is_due(policy: ProbePolicy | ReplicaPolicy | None, step: int) -> bool:
    return policy is not None and step % policy.every == 0


__all__ = ["COMPUTED", "HELD", "Integrity", "describe"]
