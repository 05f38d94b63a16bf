"""Every kind of finding that the code knows, with what it means for the job and for its node."""

from evermesh.fault.detectors import kinds
from evermesh.fault.isolation.meanings import MEANINGS

_MEAN = (
    (kinds.EXPLAINING, "nobody goes on"),
    (kinds.SLOWNESS, "training goes on, slower"),
    (kinds.HARMLESS, "nothing suffers"),
)


def finding_kinds() -> list[str]:
    """All of them: those of the detectors, then those of the step guard."""
    of_detectors = [value for name, value in vars(kinds).items() if name.isupper() and isinstance(value, str)]
    return of_detectors + [kind for kind, meaning in MEANINGS.items() if meaning.source == "corruption"]


def findings_table() -> str:
    """A row for every kind, linked to what is said about it below."""
    rows = [
        f"| [`{kind}`](#{kind.replace(' ', '-')}) | {_effect(kind)} | {_at_fault(kind)} |" for kind in finding_kinds()
    ]
    return "\n".join(["| kind | what follows | the node is at fault |", "|---|---|---|", *rows])


def _effect(kind: str) -> str:
    for found, words in _MEAN:
        if kind in found:
            return words
    return "the update is not made"


def _at_fault(kind: str) -> str:
    """As policies weigh it before they know more."""
    meaning = MEANINGS.get(kind)
    return f"{meaning.precision:.0%}" if meaning is not None and meaning.precision else "never"
