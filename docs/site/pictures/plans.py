"""One batch under our plan and under a mesh that is the same for every document, and a pipeline."""

from pathlib import Path
from tempfile import TemporaryDirectory

from evermesh.launcher.plan_picture import plan_png
from evermesh.launcher.planning import Case, restated
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Timeline

_COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=2e-3, ring_token_s=1e-6, ring_step_s=2e-4)
_LENGTHS = (
    28_000, 17_000, 12_000, 9_500, 8_000, 7_500, 6_800, 6_000, 5_200, 4_600, 4_100, 3_600, 3_000, 2_700, 2_400, 2_100,
    1_900, 1_700, 1_500, 1_300, 1_200, 1_100, 1_000, 900, 800, 700, 650, 600, 550, 500, 450, 400, 350, 300, 250, 200,
)  # fmt: skip
_LAYOUT = Layout(hdp=8, capacity=8192)


def our_plan() -> bytes:
    """The batch of the concepts, planned."""
    case = _case(_LAYOUT)
    return _drawn(case.plan, case.timeline(), "a batch of 36 documents on eight ranks")


def static_plan() -> bytes:
    """The same, every document shared by as many ranks as the longest one needs."""
    case = restated(_case(_LAYOUT), "static")
    return _drawn(case.plan, case.timeline(), "the same batch with a static context-parallel mesh")


def pipeline() -> bytes:
    """Two pipelines of four stages."""
    layout = Layout(hdp=2, pp=4, capacity=8192)
    lengths = _LENGTHS[4::2]  # few enough to be told apart
    case = _case(layout, lengths)
    return _drawn(
        case.plan, case.timeline(), "micro-batches of two pipelines, one forward and one backward in turn (1f1b)"
    )


def _case(layout: Layout, lengths: tuple[int, ...] = _LENGTHS) -> Case:
    pool = Pool.of(layout.hdp)
    return Case(plan_batch(lengths, layout, _COST, pool=pool), layout, _COST, pool, None)


def _drawn(plan: BatchPlan, timeline: Timeline, words: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.png"
        plan_png(plan, timeline, path, title=words)
        return path.read_bytes()
