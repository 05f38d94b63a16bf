"""The small types that other rooms build on: serialisation, refusals, arithmetic."""

import pytest
from pydantic import ValidationError

from evermesh.parallelism import BatchPlan, CollectiveRecord, CostModel, Layout, ModelShape, PlanInvalid, Topology
from evermesh.parallelism.batch_plan import batch_digest
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.topology import Nic, Node


def test_topology_survives_json() -> None:
    nic = Nic(name="mlx5_0", nic_class="infiniband", bytes_per_s=50e9, rail=3)
    nodes = (Node(name="a", devices=8, device_kind="h100", nics=(nic,), rack="r1"), Node(name="b", devices=8))
    topology = Topology(nodes=nodes, speeds=(1.0,) * 15 + (0.7,), speeds_version=2)
    assert Topology.model_validate_json(topology.model_dump_json()) == topology
    assert (topology.world_size, topology.node_of(7), topology.node_of(8), topology.speed_of(15)) == (16, 0, 1, 0.7)


def test_topology_refuses_wrong_numbers() -> None:
    with pytest.raises(ValidationError, match="3 speeds for 2 ranks"):
        Topology(nodes=(Node(name="a", devices=2),), speeds=(1, 1, 1))
    with pytest.raises(LayoutDoesNotFit, match="rank 4 does not exist"):
        Topology.local(4).node_of(4)


def test_layout_survives_json_and_refits() -> None:
    layout = Layout(hdp=3, tp=2, pp=2, capacity=512, activations="recompute")
    assert Layout.model_validate_json(layout.model_dump_json()) == layout
    assert layout.fitted_to(8).hdp == 2
    with pytest.raises(LayoutDoesNotFit, match=r"do not divide 9 workers\. Start 8 or 12"):
        layout.fitted_to(9)
    with pytest.raises(LayoutDoesNotFit, match=r"= 12 ranks, but 8 were started\. Set layout\.hdp to 2, or start 12"):
        layout.check_world(8)


def test_record_survives_its_dictionary() -> None:
    record = CollectiveRecord(
        "hdp", 7, "send", 4096, "float32", (3,), "ring forward", 12, "train", 1.5, "hdp", "node", 4096
    )
    assert CollectiveRecord.from_dict(record.to_dict()) == record


@pytest.mark.parametrize("payload", [b"{}", b"not json", b"[1]"])
def test_what_is_no_plan_is_refused(payload: bytes) -> None:
    with pytest.raises(PlanInvalid, match="not a batch plan"):
        BatchPlan.from_json(payload)


def test_digest_depends_on_names_lengths_and_order() -> None:
    digests = [batch_digest(*args) for args in ((["a", "b"], [1, 2]), (["b", "a"], [2, 1]), (["a", "b"], [1, 3]))]
    assert len(set(digests)) == 3


def test_flops_reproduce_the_published_step_of_mt_nlg() -> None:
    """Megatron convention: 530B on 280 DGX, 60.1 s per step, 126 TFLOP/s per GPU with full recomputation (MT-NLG, table 2).

    The formula there is 96 B s l h^2 (1 + s/6h + V/16lh) for a GELU block; ours counts the same matrices, so the check
    uses a SwiGLU width with as many weights (3 x 8/3 h = 2 x 4 h).
    """
    h, layers, s, batch, vocabulary = 20480, 105, 2048, 1920, 51200
    shape = ModelShape(
        hidden=h, layers=layers, heads=128, kv_heads=128, head_dim=160, ffn=8 * h // 3, vocabulary=vocabulary
    )
    forward = batch * (s * shape.linear_flops_per_token() + s * s * shape.attention_flops_per_pair())
    logits = 2 * batch * s * h * vocabulary
    total = 4 * (forward - logits) + 3 * logits
    assert total / (60.1 * 280 * 8) / 1e12 == pytest.approx(126, rel=0.005)


def test_cost_of_a_ring_of_one_is_the_cost_of_the_whole_document() -> None:
    cost = CostModel(token_s=1e-5, pair_s=1e-9, piece_s=1e-4, ring_step_s=1.0, ring_token_s=1.0)
    assert cost.ring_s(100, 1) == cost.whole_s(100)


def test_ring_hides_its_traffic_behind_attention_only_as_far_as_it_fits() -> None:
    cost = CostModel(token_s=1e-5, pair_s=1e-7, ring_token_s=1e-5)
    pairs = 1000 * 1001 / 2
    assert cost.ring_s(1000, 2) == pytest.approx(1e-5 * 500 + 1e-7 * pairs / 2)
    slow = cost.model_copy(update={"ring_token_s": 1e-3})
    assert slow.ring_s(1000, 2) == pytest.approx(1e-5 * 500 + 500 * 1e-3)
