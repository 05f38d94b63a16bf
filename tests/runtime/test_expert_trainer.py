"""Training a mixture whose experts all ranks hold: the same run on any layout, stopped and resumed."""

from pathlib import Path

import pytest

from evermesh.runtime import StepReport
from tests.runtime.test_tensor_trainer import MODEL, _assert_same, _config, _train

MOE = {"experts": 4, "ffn": 16, "shared_ffn": 16, "shared_gate": True, "first_dense_layers": 1}


@pytest.fixture(scope="module")
def alone(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepReport]:
    """Every step of a run that one process makes without a stop."""
    return _train(_config(odd_corpus, (1, 1), model=MODEL | {"moe": MOE}), tmp_path_factory.mktemp("alone"))


def test_experts_train_the_same_on_ranks_that_share_the_rest_and_resume_on_fewer(
    alone: list[StepReport], odd_corpus: Path, tmp_path: Path
) -> None:
    model = MODEL | {"moe": MOE}
    _train(_config(odd_corpus, (2, 2), model=model, stop_at=3), tmp_path)
    reports = _train(_config(odd_corpus, (1, 1), model=model), tmp_path, resume=True)
    assert len(reports) == 5
    _assert_same(reports, alone)
    assert alone[-1].loss < alone[0].loss
