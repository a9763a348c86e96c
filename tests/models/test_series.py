"""Networks for time series: each against PyTorch's own layers or plain numpy, and what they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import Examples, from_spec, make

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from atoll.models.gru import Cell  # noqa: E402
from atoll.models.sequence import carried  # noqa: E402
from atoll.models.series_transformer import Layer, positions  # noqa: E402
from atoll.models.tcn import Blocks  # noqa: E402

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "gru": {"hidden": 5},
    "tcn": {"channels": [4, 4]},
    "series_transformer": {"width": 8, "heads": 2, "layers": 1},
}
RANGES = {"x": (-4, 12), "u": (0, 2), "hour": (0, 24), "soon": (-10, 10), "later": (-4, 16)}


def table_of(num_rows: int = 30, seed: int = 0) -> Table:
    """x follows u three steps later, so that "soon" and "later" are known from both."""
    random = np.random.default_rng(seed)
    u = random.uniform(0, 2, num_rows + 60)
    x = np.convolve(u, [0, 0, 0, 1, 0.8, 0.6, 0.4], "full")[: len(u)]
    rows = np.arange(num_rows) + 20
    columns = {"hour": rows % 24.0}
    for name, values in (("x", x), ("u", u)):
        columns |= {f"{name}_lag{n}" if n else name: values[rows - n] for n in range(STEPS)}
    columns |= {"soon": x[rows + 1], "later": x[rows + 3], "alarm": (x[rows + 3] > 3).astype(float)}
    declared = {name: Column(range=RANGES[name.split("_")[0]]) for name in columns if name != "alarm"}
    declared["alarm"] = Column(dtype="integer", values=(0, 1), role="label")
    return Table(TableSchema(name="test", columns=declared), columns)


def series(kind: str, table: Table, **more: Any) -> Any:
    shared = {"target": ["soon", "later"], "series": {"x": STEPS, "u": STEPS}, "features": ["hour"], "anchor": "x"}
    return make({"kind": kind, **KINDS[kind], **shared, **more}, table.schema)


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


@pytest.mark.parametrize("change", [{}, {"anchor": None, "target": "alarm"}, {"gaps": "mark", "loss": "absolute"}])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_equals_clipping_one_after_another(kind: str, change: dict[str, Any]) -> None:
    table = table_of()
    if "gaps" in change:
        table["u_lag2"][::3] = np.nan
    model = series(kind, table, **change)
    weights, batch = model.initial(3), model.examples(table)
    weights = weights + np.random.default_rng(0).normal(0, 0.1, len(weights))  # beyond a head that only copies
    norms = [np.linalg.norm(model.loss_and_gradient(weights, batch.take(slice(i, i + 1)))[1]) for i in range(30)]
    for clip in (float(np.median(norms)), 1e6):
        total, clipped, loss = model.clipped_gradient_sum(weights, batch, clip)
        wanted = one_by_one(model, weights, batch, clip)
        assert np.allclose(total, wanted[0], rtol=0, atol=3e-5 * max(1e-3, np.linalg.norm(wanted[0])))
        assert clipped == wanted[1]
        assert loss == pytest.approx(wanted[2], rel=1e-5)


def test_the_recurrent_layer_is_pytorchs() -> None:
    cell, theirs = Cell(3, 5), nn.GRU(3, 5, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(cell.came.weight)
        theirs.weight_hh_l0.copy_(cell.state.weight)
        theirs.bias_ih_l0.copy_(cell.came.bias)
        theirs.bias_hh_l0.copy_(cell.state.bias)
    window = torch.randn(7, 9, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cell(window), theirs(window)[0][:, -1], atol=1e-6)


def test_the_transformers_layer_is_pytorchs() -> None:
    layer = Layer(8, 2)
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    norm, attention = layer.attention
    other, first, _, second = layer.forward_part
    pairs = [
        (theirs.self_attn.in_proj_weight, attention.ask.weight), (theirs.self_attn.in_proj_bias, attention.ask.bias),
        (theirs.self_attn.out_proj.weight, attention.out.weight), (theirs.self_attn.out_proj.bias, attention.out.bias),
        (theirs.linear1.weight, first.weight), (theirs.linear1.bias, first.bias),
        (theirs.linear2.weight, second.weight), (theirs.linear2.bias, second.bias),
    ]  # fmt: skip
    with torch.no_grad():
        for their, own in pairs:
            their.copy_(own)
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(other, nn.LayerNorm)
    window = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(window), theirs.train()(window), atol=1e-5)


def test_positions_are_the_papers() -> None:
    found = positions(5, 6).numpy()
    for step in range(5):
        for i in range(3):
            angle = step / 10000 ** (2 * i / 6)
            assert found[step, 2 * i : 2 * i + 2] == pytest.approx([np.sin(angle), np.cos(angle)], abs=1e-6)


def test_convolutions_are_dilated_causal_and_residual() -> None:
    """Written a second time, in numpy, step by step; and steps beyond the field that the docstring tells of are not
    seen, the first within is."""
    blocks = Blocks(2, (3, 3), 2)
    window = np.random.default_rng(0).normal(size=(1, 10, 2)).astype(np.float32)

    def convolved(x: np.ndarray, layer: Any, dilation: int) -> np.ndarray:
        weight, bias = layer.weight.detach().numpy()[:, :, 0], layer.bias.detach().numpy()
        out = np.tile(bias, (len(x), 1)).astype(float)
        for step in range(len(x)):
            for k in range(weight.shape[2]):
                if (before := step - (weight.shape[2] - 1 - k) * dilation) >= 0:
                    out[step] += weight[:, :, k] @ x[before]
        return out

    x: np.ndarray = window[0]
    for i, block in enumerate(blocks.blocks):
        inner = np.maximum(convolved(np.maximum(convolved(x, block.first, 2**i), 0), block.second, 2**i), 0)
        across = convolved(x, block.across, 1) if i == 0 else x
        x = np.maximum(across + inner, 0)
    with torch.no_grad():
        assert np.allclose(blocks(torch.from_numpy(window))[0].numpy(), x[-1], atol=1e-5)

    given = torch.from_numpy(np.abs(window)).requires_grad_()
    for parameter in blocks.parameters():
        parameter.data.abs_()
    blocks(given).sum().backward()
    seen = given.grad.abs().sum((0, 2)).numpy() > 0
    assert seen.tolist() == [False] * 3 + [True] * (1 + 2 * 1 * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_before_any_learning_a_forecast_is_the_newest_value(kind: str) -> None:
    """Whatever the targets' ranges are."""
    table = table_of()
    model = series(kind, table)
    predicted = model.with_weights(model.initial(1)).predict(table)
    assert np.allclose(predicted, table["x"][:, None], atol=1e-5)


@pytest.mark.parametrize("loss", ["squared", "absolute"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_better_than_the_newest_value(kind: str, loss: str) -> None:
    table, test = table_of(400), table_of(100, seed=1)
    model = series(kind, table, loss=loss)
    weights, batch = model.initial(0), model.examples(table)
    rate = {"squared": 0.5, "absolute": 0.05}[loss]
    for _ in range(80):
        weights -= rate * model.loss_and_gradient(weights, batch)[1]
    error = np.abs(model.with_weights(weights).predict(test) - np.column_stack([test["soon"], test["later"]])).mean(0)
    before = np.abs(test["x"][:, None] - np.column_stack([test["soon"], test["later"]])).mean(0)
    assert error.mean() < 0.9 * before.mean()


def test_losses_are_in_units_of_half_the_range() -> None:
    table = table_of()
    for loss in ("squared", "absolute"):
        model = series("tcn", table, loss=loss)
        off = np.column_stack([(table["x"] - table["soon"]) / 10, (table["x"] - table["later"]) / 10])
        wanted = np.abs(off).mean() if loss == "absolute" else (off**2).mean() / 2
        assert model.loss_and_gradient(model.initial(0), model.examples(table))[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_makes_the_model_it_came_from(kind: str) -> None:
    """And columns may be written out, or told as the step "lag" names them."""
    table = table_of()
    model = series(kind, table, anchor=None, target="alarm", gaps="mark")
    model = model.with_weights(model.initial(2))
    again = from_spec(model.spec(), table.schema, model.arrays())
    assert again.predict(table).tobytes() == model.predict(table).tobytes()
    assert ((model.predict(table) > 0) & (model.predict(table) < 1)).all()
    assert model.predict(table.rows(np.zeros(30, bool))).shape == (0,)
    columns = {n: [*(f"{n}_lag{i}" for i in range(STEPS - 1, 0, -1)), n] for n in ("x", "u")}
    written = series(kind, table, anchor=None, target="alarm", gaps="mark", series=columns)
    assert written.with_weights(model.weights).predict(table).tobytes() == model.predict(table).tobytes()


def test_gaps_are_carried_on_and_marked() -> None:
    random = np.random.default_rng(0)
    values = np.where(random.random((50, 8)) < 0.5, np.nan, random.normal(size=(50, 8)))
    values[3] = np.nan
    wanted = pd.DataFrame(values).ffill(axis=1).bfill(axis=1).fillna(0)
    assert np.array_equal(carried(values), wanted)
    table = table_of()
    table["u_lag1"][:] = np.nan
    [window] = series("gru", table, gaps="mark").inputs(table)
    assert window.shape == (30, STEPS, 5)
    assert window[0, :, 3].tolist() == [1, 1, 1, 1, 0, 1]
    assert (window[:, :, 2] == 1).all()
    assert window[:, 4, 1].tolist() == window[:, 3, 1].tolist()
    with pytest.raises(SchemaError) as caught:
        series("gru", table).inputs(table)
    assert (caught.value.code, caught.value.field) == ("schema.missing", "u_lag1")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"series": {"x": STEPS, "u": STEPS - 1}}, "model.series-length"),
        ({"series": {"x": [], "u": []}}, "model.series-length"),
        ({"series": {"x": STEPS + 1}}, "plan.bad-column"),
        ({"features": ["gone"]}, "plan.bad-column"),
        ({"anchor": "hour"}, "model.bad-anchor"),
        ({"target": "alarm"}, "model.bad-anchor"),
        ({"width": 6}, "model.bad-heads"),
    ],
)
def test_what_cannot_be_is_refused_without_data(change: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        series("series_transformer", table_of(), **change)
    assert caught.value.code == code


def test_one_site_learns_as_plain_sgd_on_windows(drive: Any) -> None:
    """FedAvg of one site with one full batch a round is gradient descent."""
    table = table_of()
    spec = {k: v for k, v in series("gru", table).spec().items() if k != "target"}
    params = {"target": ["soon", "later"], "model": spec, "rounds": 5, "batch_size": 30, "learning_rate": 0.3}
    model = series("gru", table)
    weights, batch = model.initial(0).astype(np.float32), model.examples(table)
    for _ in range(5):
        weights = weights - np.float32(0.3) * model.loss_and_gradient(weights, batch)[1]
    driven = drive(build("horizontal.fedavg", params).coordinate(Cohort(("s0",), table.schema)), {"s0": table})
    assert np.allclose(driven.result["model"].weights, weights, atol=1e-6)
