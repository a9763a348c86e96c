"""Networks: gradients against finite differences, and clipping against one example after another."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import Examples, Settings, from_spec, make

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from atoll.models.network import Network, pieces  # noqa: E402

TARGETS: dict[str, dict[str, Any]] = {
    "binary": {"dtype": "integer", "values": [0, 1]},
    "regression": {"range": [-10, 30]},
}


def table_of(task: str = "binary", n: int = 40, shape: tuple[int, ...] = (12, 10), seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    columns = {"image": Column(dtype="image", shape=shape), "y": Column(**TARGETS[task], role="label")}
    light = random.integers(0, 156, n)
    images = (random.integers(0, 100, (n, *shape)) + light.reshape(-1, *[1] * len(shape))).astype(np.uint8)
    labels = (light > 77).astype(float) if task == "binary" else light / 4.0 - 9
    return Table(TableSchema(name="test", columns=columns), {"image": images, "y": labels})


def cnn(table: Table, **more: Any) -> Any:
    return make({"kind": "cnn", "image": "image", "target": "y", "channels": [3, 5], "hidden": 7, **more}, table.schema)


def one_by_one(model: Any, weights: np.ndarray, batch: Examples, clip: float) -> tuple[np.ndarray, int, float]:
    """Written a second time: ordinary back-propagation of each example alone."""
    total, clipped, losses = np.zeros(len(weights)), 0, 0.0
    for i in range(len(batch)):
        loss, gradient = model.loss_and_gradient(weights, batch.take(slice(i, i + 1)))
        norm = np.linalg.norm(gradient)
        total += gradient * min(1, clip / norm)
        clipped += norm > clip
        losses += loss
    return total, clipped, losses


class _Kind(Network):
    """A network of the test's own on the image, to try layers that the CNN has not."""

    built: ClassVar[Any]

    def encoder(self) -> Any:
        return self.built(), 1

    def inputs(self, table: Any) -> Any:
        return (table["image"],)

    def tensors(self, inputs: Any) -> Any:
        return (torch.from_numpy(inputs[0]).float().div(64).sub(2),)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(10, 10), nn.Linear(120, 1)

    def forward(self, x: Any) -> Any:
        return self.out(self.layer(torch.tanh(self.layer(x))).flatten(1))


NETWORKS: dict[str, Any] = {
    "sequence": lambda: nn.Sequential(nn.Linear(10, 90), nn.Tanh(), nn.Flatten(), nn.Linear(1080, 1)),  # Gram matrices
    "strided": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 12)),
        nn.Conv2d(1, 4, 3, stride=2, dilation=2, bias=False),
        nn.Flatten(),
        nn.LazyLinear(1),
    ),
    "normalised": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(120), nn.Linear(120, 1)),  # by torch.func
    "grouped": lambda: nn.Sequential(nn.Conv2d(12, 12, (1, 1), groups=3), nn.Flatten(), nn.Linear(120, 1)),
    "twice": _Twice,  # shared weights
}


def network(name: str, table: Table) -> Any:
    def layers() -> Any:
        made = NETWORKS[name]()
        made(torch.zeros(2, 12, 10) if name != "grouped" else torch.zeros(2, 12, 10, 1))
        return made

    kind = type("Kind", (_Kind,), {"built": staticmethod(layers)})
    if name == "grouped":
        kind.tensors = lambda self, inputs: (torch.from_numpy(inputs[0]).float().div(64).sub(2)[..., None],)
    return kind(Settings(kind=name, target="y"), table.schema)


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("name", ["cnn", *NETWORKS])
def test_clipping_equals_clipping_one_after_another(name: str, task: str) -> None:
    table = table_of(task)
    model = cnn(table) if name == "cnn" else network(name, table)
    weights, batch = model.initial(3), model.examples(table)
    norms = [
        np.linalg.norm(model.loss_and_gradient(weights, batch.take(slice(i, i + 1)))[1]) for i in range(len(batch))
    ]
    for clip in (float(np.median(norms)), 1e-3, 1e6):
        total, clipped, loss = model.clipped_gradient_sum(weights, batch, clip)
        wanted = one_by_one(model, weights, batch, clip)
        assert np.allclose(total, wanted[0], rtol=0, atol=3e-5 * max(1e-3, np.linalg.norm(wanted[0])))
        assert clipped == wanted[1]
        assert loss == pytest.approx(wanted[2], rel=1e-5)


def test_a_clipped_gradient_never_exceeds_the_norm() -> None:
    """Not even by float32's rounding: the privacy noise rests on it."""
    table = table_of(n=200)
    model = cnn(table)
    weights, batch = 0.5 * model.initial(1), model.examples(table)
    for i in range(200):
        total, clipped, _ = model.clipped_gradient_sum(weights, batch.take(slice(i, i + 1)), 1e-2)
        assert np.linalg.norm(total) <= 1e-2
        assert clipped == 1


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3)])
def test_standardised_images_do_not_show_the_scanner(shape: tuple[int, ...]) -> None:
    table = table_of(shape=shape)
    table["image"][:] //= 3
    model = cnn(table, standardise=True)
    model = model.with_weights(model.initial(0))
    darker = Table(table.schema, {**table.columns, "image": 2 * table["image"] + 20})
    assert np.allclose(model.predict(darker), model.predict(table), atol=0.02)
    [tensor] = model.tensors((np.full((2, *shape), 7, np.uint8),))
    assert (tensor == 0).all()


@pytest.mark.parametrize("task", TARGETS)
def test_the_gradient_is_the_losss_derivative(task: str) -> None:
    table = table_of(task)
    model = network("sequence", table)  # no kinks
    weights, batch = 0.3 * model.initial(0), model.examples(table)
    loss, gradient = model.loss_and_gradient(weights, batch)
    random = np.random.default_rng(0)
    for _ in range(5):
        direction = random.normal(size=len(weights))
        direction /= np.linalg.norm(direction)
        up, down = (model.loss_and_gradient(weights + s * 3e-3 * direction, batch)[0] for s in (1, -1))
        assert gradient @ direction == pytest.approx((up - down) / 6e-3, rel=0.02, abs=2e-3)
    unclipped = model.clipped_gradient_sum(weights, batch, 1e6)
    assert np.allclose(unclipped[0] / len(batch), gradient, atol=1e-5 * np.linalg.norm(gradient))
    assert unclipped[2] / len(batch) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("name", ["cnn", *NETWORKS])
def test_plain_steps_are_those_along_the_gradient(name: str, task: str) -> None:
    """To the last bit, and whatever was done with the network before and after."""
    table = table_of(task)
    model = cnn(table) if name == "cnn" else network(name, table)
    start, rows = model.initial(3).astype(model.dtype), np.random.default_rng(1).permutation(len(table)).reshape(8, -1)
    batches = [model.examples(table).take(own) for own in rows]
    wanted, rate, losses = start.copy(), np.float32(0.001), []
    for batch in batches:
        loss, gradient = model.loss_and_gradient(wanted, batch)
        wanted -= rate * gradient
        losses.append(loss)
    for _ in range(2):
        found, told = model.descended(start, iter(batches), 0.001)
        assert found.tobytes() == wanted.tobytes() != start.tobytes()
        assert told == losses
        assert model.loss_and_gradient(start, batches[0])[0] == losses[0]
        model.clipped_gradient_sum(start, batches[0], 1.0)
    assert model.descended(start, [], 0.001)[0].tobytes() == start.tobytes()


def test_long_batches_are_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of()
    model = cnn(table)
    weights, batch = model.initial(0), model.examples(table)
    whole, predicted = model.clipped_gradient_sum(weights, batch, 0.1), model.with_weights(weights).predict(table)
    monkeypatch.setattr("atoll.models.network.AT_ONCE", 7 * 120)
    assert [len(range(40)[rows]) for rows in pieces(batch.inputs)] == [7, 7, 7, 7, 7, 5]
    parts = model.clipped_gradient_sum(weights, batch, 0.1)
    assert np.allclose(whole[0], parts[0], atol=1e-6)
    assert whole[1] == parts[1]
    assert np.allclose(model.with_weights(weights).predict(table), predicted, atol=1e-6)


def test_beginnings_are_a_function_of_the_seed_alone() -> None:
    model = cnn(table_of())
    torch.manual_seed(1)
    first = model.initial(5)
    torch.manual_seed(2)
    assert cnn(table_of()).initial(5).tobytes() == first.tobytes()
    assert model.initial(6).tobytes() != first.tobytes()
    assert np.array_equal(first, first.astype(np.float32))


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1), (12, 10, 3)])
def test_a_spec_makes_the_model_it_came_from(shape: tuple[int, ...]) -> None:
    table = table_of(shape=shape)
    model = cnn(table)
    model = model.with_weights(model.initial(2))
    again = from_spec(model.spec(), table.schema, model.arrays())
    assert again.spec() == model.spec()
    assert again.predict(table).tobytes() == model.predict(table).tobytes()
    assert ((model.predict(table) > 0) & (model.predict(table) < 1)).all()
    assert model.predict(table.rows(np.zeros(40, bool))).shape == (0,)
    with pytest.raises(PlanError) as caught:
        from_spec(model.spec(), table.schema, {"weights": np.zeros(3)})
    assert caught.value.code == "model.shape"


def test_values_are_predicted_in_the_targets_unit() -> None:
    table = table_of("regression", n=200)
    model = cnn(table)
    weights, batch = model.initial(0), model.examples(table)
    for _ in range(200):
        weights -= 0.05 * model.loss_and_gradient(weights, batch)[1]
    fitted = model.with_weights(weights)
    error = fitted.predict(table) - table["y"]
    assert model.task == "regression"
    assert (error**2).mean() < 0.7 * table["y"].var()
    assert model.loss_and_gradient(weights, batch)[0] == pytest.approx((error**2).mean() / 2 / 20**2, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"image": "y"}, "plan.bad-column"),
        ({"image": "gone"}, "plan.bad-column"),
        ({"target": "image"}, "plan.bad-column"),
        ({"channels": [2, 2, 2, 2]}, "model.too-deep"),
    ],
)
def test_networks_that_cannot_be_are_refused_without_data(change: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        cnn(table_of(), **change)
    assert caught.value.code == code


def test_a_missing_label_is_an_error_that_names_the_column() -> None:
    table = table_of("regression")
    table["y"][3] = np.nan
    with pytest.raises(SchemaError) as caught:
        cnn(table).examples(table)
    assert (caught.value.code, caught.value.field) == ("schema.missing", "y")
