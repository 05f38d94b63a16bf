"""Who computes what when chunks of a stripe are lost: a pure function of what all members have told each other."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from evermesh.fault.snapshot.coding import TooManyErasures
from evermesh.fault.snapshot.coding.field import Matrix
from evermesh.fault.snapshot.stripes.record import StripeRecord


class Repair(NamedTuple):
    """One row in which one member computes chunks that it or others lack."""

    row: int
    by: int
    sources: tuple[int, ...]
    """Members whose chunks it takes, itself among them where it has one; those of length zero are left out."""
    targets: tuple[int, ...]
    """Members that lack theirs."""
    rows: Matrix
    """Coefficients of the sources for every target."""


class Damage(NamedTuple):
    """What cannot be read any more."""

    lost: AbstractSet[int]
    """Members that hold nothing, and want all they had."""
    absent: AbstractSet[int]
    """Members that hold nothing and are not there."""
    corrupt: Mapping[int, AbstractSet[int]]
    """Of other members the rows in which their chunk is corrupt."""


def repairs(record: StripeRecord, damage: Damage) -> list[Repair]:
    """All repairs, by row.

    What members of ``lost`` had is computed by the others in turns, so that nobody receives more than it has; a member
    with a corrupt chunk computes it itself. So those who compute for others never wait for one who does.

    Raises:
        TooManyErasures: more chunks of a row are lost or corrupt than the code has parity. Nobody can rebuild them.
    """
    found = []
    for row, sizes in enumerate(record.rows.size.tolist()):
        corrupt = {member for member, rows in damage.corrupt.items() if row in rows}
        erased = {member for member in {*damage.lost, *damage.absent, *corrupt} if sizes[member]}
        if len(erased) > record.code.parity:
            names = ", ".join(map(str, sorted(erased)))
            raise TooManyErasures(f"row {row} of step {record.step}, members {names}", len(erased), record.code.parity)
        wanted = sorted(erased & set(damage.lost))
        if wanted:
            able = sorted(set(range(record.code.parts)) - damage.lost - damage.absent - corrupt)
            by = able[(row + row // record.code.parts) % len(able)]
            found.append(_repair(record, row, sizes, erased, by, wanted))
        found += [_repair(record, row, sizes, erased, member, [member]) for member in sorted(corrupt & erased)]
    return found


def _repair(
    record: StripeRecord, row: int, sizes: Sequence[int], erased: AbstractSet[int], by: int, targets: Sequence[int]
) -> Repair:
    part = record.rows.part[row].tolist()
    usable = [member for member in range(record.code.parts) if member not in erased]
    # what is empty costs nothing, what is one's own no transfer, and without Q there is nothing to multiply
    usable.sort(key=lambda member: (sizes[member] > 0, member != by, part[member]))
    chosen = usable[: record.code.data]
    rows = record.code.solve([part[target] for target in targets], [part[member] for member in chosen])
    given = [at for at, member in enumerate(chosen) if sizes[member]]
    return Repair(
        row,
        by,
        tuple(chosen[at] for at in given),
        tuple(targets),
        tuple(tuple(coefficients[at] for at in given) for coefficients in rows),
    )
