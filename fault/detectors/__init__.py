"""From records of collectives to findings: which rank, node or link is at fault, and who is not."""

from evermesh.fault.detectors.context import Context, Offset
from evermesh.fault.detectors.diagnosing import Diagnosis, diagnose
from evermesh.fault.detectors.expected import planned_work

__all__ = ["Context", "Diagnosis", "Offset", "diagnose", "planned_work"]
