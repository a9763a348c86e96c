"""Atoll's models as subjects: the attacked gradient is, to the last digits, the one that a site computes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atoll.audit.linear_layer import ratios  # noqa: E402
from atoll.audit.network import batch_gradient  # noqa: E402
from atoll.audit.subjects import batch_of, in_order, subject_of  # noqa: E402
from atoll.contract.errors import PlanError  # noqa: E402
from atoll.contract.schema import TableSchema  # noqa: E402
from atoll.models.cnn import Cnn, CnnSpec  # noqa: E402
from atoll.models.linear import LinearModel  # noqa: E402
from atoll.models.model import Examples  # noqa: E402

LABEL = {"dtype": "integer", "values": [0, 1], "role": "label"}


def flat(gradient: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([g.flatten() for g in gradient.values()]).double().numpy()


@pytest.mark.parametrize("standardise", [False, True])
def test_a_cnn_has_the_gradients_that_its_sites_compute(standardise: bool) -> None:
    columns = {"image": {"dtype": "image", "shape": [20, 24]}, "ill": LABEL}
    schema = TableSchema.model_validate({"name": "x", "version": "1", "max_rows": 100, "columns": columns})
    model = Cnn.of(CnnSpec(image="image", target="ill", standardise=standardise), schema)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (6, 20, 24), dtype=np.uint8), random.integers(0, 2, 6).astype(float)
    weights = model.initial(3)
    subject = subject_of(model, weights, images)
    x, y = batch_of(model, images, labels)
    _, wanted = model.loss_and_gradient(weights, Examples((images,), labels))
    got = flat(batch_gradient(subject.model, subject.scale(x), y))
    assert in_order(model, got) == pytest.approx(wanted, abs=1e-6)
    total, _, _ = model.clipped_gradient_sum(weights, Examples((images,), labels), 0.1)
    clipped = flat(batch_gradient(subject.model, subject.scale(x), y, clip_norm_l2=0.1)) * 6
    assert clipped == pytest.approx(total, abs=1e-4)


def test_a_row_of_a_linear_model_comes_back_in_its_own_scale() -> None:
    columns = {"age": {"dtype": "real", "range": [0, 120]}, "dose": {"dtype": "real", "range": [-1, 3]}, "ill": LABEL}
    schema = TableSchema.model_validate({"name": "x", "version": "1", "max_rows": 100, "columns": columns})
    model = LinearModel.zero("logistic", schema, ("age", "dose"), "ill")
    rows = np.array([[30.0, 2.0]])
    subject = subject_of(model, np.array([0.1, -0.2, 0.3]), rows)
    x, y = batch_of(model, rows, np.ones(1))
    gradient = batch_gradient(subject.model, x, y)
    design = model.design(rows)
    error = model.mean(design @ np.array([0.1, -0.2, 0.3])) - 1
    assert flat(gradient) == pytest.approx(in_order(model, design[0] * error), abs=1e-6)
    scaled = ratios(gradient, "0")[0].numpy()
    assert scaled * model.scale.half + model.scale.middle == pytest.approx([30.0, 2.0], rel=1e-4)


def test_other_models_are_refused() -> None:
    with pytest.raises(PlanError) as caught:
        subject_of(object(), np.zeros(1), np.zeros((1, 1)))  # type: ignore[arg-type]
    assert caught.value.code == "audit.no-subject"
