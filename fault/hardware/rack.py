"""In which rack a node is, as variables and labels of schedulers tell. Pure functions."""

from collections.abc import Mapping

_LABELS = (
    "evermesh.io/rack",
    "rack",
    "topology.kubernetes.io/rack",
    "cloud.google.com/gce-topology-subblock",
    "topology.k8s.aws/network-node-layer-3",
)
"""Labels of nodes in Ray and Kubernetes that name what is behind one leaf switch, the first that is there counts."""


def find_rack(environ: Mapping[str, str], labels: Mapping[str, str]) -> tuple[str | None, str]:
    """The rack or leaf switch of this node, and who says so: EVERMESH_RACK, else Slurm, else a label."""
    if rack := environ.get("EVERMESH_RACK"):
        return rack, "EVERMESH_RACK"
    if leaf := _slurm_leaf(environ):
        return leaf, "SLURM_TOPOLOGY_ADDR"
    for name in _LABELS:
        if rack := labels.get(name):
            return rack, f"label {name}"
    return None, ""


def _slurm_leaf(environ: Mapping[str, str]) -> str | None:
    """The switch above the node: ``s2`` of ``s0.s2.tux7``, of which the pattern says ``switch.switch.node``."""
    parts = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if kinds[-1] != "node" or "switch" not in kinds or len(parts) < len(kinds):
        return None
    return parts[len(kinds) - 2] or None  # a name of a node may have dots, and comes last
