"""Fusion: what is missing is left out; each part's mean is written a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.models.allowed import allow
from atoll.models.model import Examples, from_spec, make

torch = pytest.importorskip("torch")

from atoll.models.fusion import filled  # noqa: E402

IMAGE = {"kind": "cnn", "image": "image", "channels": [2], "hidden": 4}
TEXT = {"kind": "embedding_bag", "text": "says", "buckets": 40, "width": 5, "length": 30}
SERIES = {"kind": "gru", "series": {"flow": ["f2", "f1", "f0"]}, "hidden": 3}
NUMBERS = {"kind": "mlp", "features": ["a", "b"], "hidden": [4]}
PARTS: dict[str, dict[str, Any]] = {"image": IMAGE, "text": TEXT, "series": SERIES, "numbers": NUMBERS}
COLUMNS: dict[str, dict[str, Any]] = {
    "image": {"dtype": "image", "shape": [4, 4]},
    "says": {"dtype": "text"},
    **{name: {"range": [0, 9]} for name in ("f2", "f1", "f0", "a", "b")},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
READS = {"image": ["image"], "text": ["says"], "series": ["f2", "f1", "f0"], "numbers": ["a", "b"]}


def table_of(n: int = 12, seed: int = 0, lacks: dict[str, Any] | None = None) -> Table:
    """*lacks*: by part, the rows in which its first column is missing."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n).astype(float)
    data: dict[str, Any] = {name: random.uniform(0, 9, n) for name in ("f2", "f1", "f0", "a", "b")}
    data["image"] = random.integers(1, 256, (n, 4, 4)).astype(np.uint8)
    data["says"] = np.array([random.choice(["flood", "sun", "bridge closed", "help"]) for _ in range(n)], object)
    for part, rows in (lacks or {}).items():
        column = data[READS[part][0]]
        column[rows] = {"image": 0, "text": None}.get(part, np.nan)
    columns = {name: Column(**declared) for name, declared in COLUMNS.items()}
    return Table(TableSchema(name="test", columns=columns), {**data, "y": y})


def fusion(table: Table, *names: str, **more: Any) -> Any:
    parts = [PARTS[name] for name in names or PARTS]
    return make({"kind": "fusion", "parts": parts, "width": 6, "target": "y", **more}, table.schema)


LACKS = {"image": [0, 1, 2, 11], "text": [1, 4, 11], "series": [2, 5, 11], "numbers": [6, 11]}


def test_a_row_is_the_mean_over_the_parts_that_it_has() -> None:
    """Written a second time, each row alone and each part by the model of its own kind."""
    table = table_of(lacks=LACKS)
    model = fusion(table)
    weights = model.initial(3)
    model.load(weights)
    found = model.with_weights(weights).predict(table)
    net = dict(model.net.named_parameters())
    for row in range(12):
        alone = table.rows(np.arange(12) == row)
        seen = []
        for number, (name, spec) in enumerate(PARTS.items()):
            if row in LACKS[name]:
                continue
            part = make({**spec, "target": "y"}, table.schema)
            for layer, values in part.net.encoder.named_parameters():
                values.data = net[f"encoder.parts.{number}.{layer}"].data
            with torch.no_grad():
                inner = part.net.encoder(*part.tensors(part.inputs(alone)))[0]
                into = (net[f"encoder.into.{number}.{what}"] for what in ("weight", "bias"))
                seen.append(torch.nn.functional.linear(inner, *into).relu())
        mean = torch.stack(seen).mean(0) if seen else torch.zeros(6)
        out = torch.nn.functional.linear(mean, net["head.weight"], net["head.bias"]).detach()
        assert found[row] == pytest.approx(float(out.sigmoid()), abs=1e-6)
    assert found[11] == pytest.approx(1 / (1 + np.exp(-weights[-1])))  # nothing is known of it


def test_what_stands_in_a_missing_ones_place_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(lacks=LACKS)
    model = fusion(table)
    weights, batch = model.initial(3) + 0.1, model.examples(table)
    random, disturbed = np.random.default_rng(1), []
    for values in batch.inputs:
        if values.dtype == bool:
            there = values
            disturbed.append(values)
            continue
        other = values.copy()
        other[~there] = random.integers(0, 39, other.shape)[~there]
        assert (other != values).any()
        disturbed.append(other)
    other = Examples(tuple(disturbed), batch.labels)
    loss, gradient = model.loss_and_gradient(weights, batch)
    assert model.loss_and_gradient(weights, other)[0] == loss
    assert np.array_equal(model.loss_and_gradient(weights, other)[1], gradient)
    clipped = model.clipped_gradient_sum(weights, batch, 0.1)[0]
    assert np.allclose(model.clipped_gradient_sum(weights, other, 0.1)[0], clipped, rtol=0, atol=1e-6)
    fitted = model.with_weights(weights)
    predicted = fitted.predict(table)
    monkeypatch.setattr(fitted, "inputs", lambda table: other.inputs)
    assert np.array_equal(fitted.predict(table), predicted)


@pytest.mark.parametrize("absent", PARTS)
def test_a_site_without_a_modality_does_not_move_its_part(absent: str) -> None:
    table = table_of(lacks={absent: slice(None)})
    model = fusion(table)
    weights, batch = model.initial(3), model.examples(table)
    number = list(PARTS).index(absent)
    own = [where for layer, where in model.layers.items() if layer.split(".")[2:3] == [str(number)]]
    assert len(own) >= 3
    for gradient in (model.loss_and_gradient(weights, batch)[1], model.clipped_gradient_sum(weights, batch, 0.1)[0]):
        assert all((gradient[where] == 0).all() for where in own)
        assert np.linalg.norm(gradient) > 0
    others = [name for name in PARTS if name != absent]
    smaller = fusion(table, *others)
    without = smaller.initial(0)
    for layer, where in smaller.layers.items():
        at = layer.split(".")
        if at[0] == "encoder":
            at[2] = str(list(PARTS).index(others[int(at[2])]))
        without[where] = weights[model.layers[".".join(at)]]
    assert np.allclose(
        smaller.with_weights(without).predict(table), model.with_weights(weights).predict(table), atol=1e-6
    )


@pytest.mark.parametrize("names", [(), ("text", "numbers"), ("image", "series")])
def test_clipping_equals_clipping_one_after_another(names: tuple[str, ...]) -> None:
    table = table_of(lacks=LACKS)
    model = fusion(table, *names)
    weights, batch = model.initial(3) + 0.05, model.examples(table)
    each = [model.loss_and_gradient(weights, batch.take(slice(i, i + 1))) for i in range(len(batch))]
    norms = np.array([np.linalg.norm(gradient) for _, gradient in each])
    for clip in (1.01 * float(np.median(norms)), 1e-3, 1e6):
        wanted = sum(g * min(1, clip / n) for (_, g), n in zip(each, norms, strict=True))
        total, clipped, loss = model.clipped_gradient_sum(weights, batch, clip)
        assert np.allclose(total, wanted, rtol=0, atol=3e-5 * max(1e-3, np.linalg.norm(wanted)))
        assert clipped == (norms > clip).sum()
        assert loss == pytest.approx(sum(one for one, _ in each), rel=1e-5)


def test_clipping_with_a_transformer_equals_clipping_one_after_another() -> None:
    table = table_of(lacks=LACKS)
    spec = {"kind": "text_transformer", "text": "says", "buckets": 40, "width": 8, "heads": 2, "layers": 1}
    model = fusion(table, parts=[spec, NUMBERS])
    weights, batch = model.initial(3), model.examples(table)
    each = [model.loss_and_gradient(weights, batch.take(slice(i, i + 1)))[1] for i in range(len(batch))]
    wanted = sum(g * min(1, 0.3 / np.linalg.norm(g)) for g in each)
    assert np.allclose(model.clipped_gradient_sum(weights, batch, 0.3)[0], wanted, rtol=0, atol=1e-5)


def test_parts_begin_as_they_begin_alone() -> None:
    table = table_of()
    model = fusion(table)
    begun = model.initial(3)
    alone = make({**TEXT, "target": "y"}, table.schema)
    rows = alone.initial(3 + list(PARTS).index("text"))[alone.layers["encoder.words.weight"]]
    assert np.array_equal(begun[model.layers["encoder.parts.1.words.weight"]], rows)
    again = from_spec(model.spec(), table.schema, model.with_weights(begun).arrays())
    assert again.predict(table).tobytes() == model.with_weights(begun).predict(table).tobytes()
    assert model.with_weights(begun).predict(table.rows(np.zeros(12, bool))).shape == (0,)


def test_a_series_that_marks_its_gaps_is_missing_where_all_of_it_is() -> None:
    table = table_of(lacks={"series": [0, 1]})
    for name in ("f1", "f0"):
        table[name][0] = np.nan
    model = make(
        {"kind": "fusion", "parts": [{**SERIES, "gaps": "mark"}, NUMBERS], "target": "y"}, table.schema
    )  # fmt: skip
    there, windows, also, _ = model.inputs(table)
    assert there.tolist() == [False, *[True] * 11]
    assert windows[1, :, 1].tolist() == [0, 1, 1]  # one gap, marked
    assert also.all()


def test_images_are_missing_only_where_the_schema_allows_it() -> None:
    table = table_of(lacks={"image": [3]})
    with pytest.raises(SchemaError) as caught:
        make({**IMAGE, "target": "y"}, table.schema).examples(table)
    assert (caught.value.code, caught.value.field) == ("schema.missing", "image")
    assert np.flatnonzero(~fusion(table, "image").inputs(table)[0]).tolist() == [3]
    image = table.schema.columns["image"].model_copy(update={"missing": "forbid"})
    strict = Table(table.schema.with_columns({"image": image}), table.columns)
    assert fusion(strict, "image").inputs(strict)[0].all()
    assert len(make({**IMAGE, "target": "y"}, strict.schema).examples(strict)) == 12


def test_a_filled_table_has_no_gaps() -> None:
    table = table_of(lacks=LACKS)
    view, gaps = filled(Table(table.schema, {**table.columns, "y": np.where(np.arange(12) < 2, np.nan, table["y"])}))
    assert len(view) == 12
    assert not np.isnan(view["y"]).any()
    assert gaps[0].tolist() == [True] * 2 + [False] * 10
    [batch] = view.batches(("a", "b"))
    assert not np.isnan(batch).any()
    assert (view.schema, view.dropped, view.achieved) == (table.schema, {}, {})
    dates = TableSchema(name="test", columns={"t": Column(dtype="date")})
    days, gaps = filled(Table(dates, {"t": np.array(["2020-01-01", "NaT"], "<M8[D]")}))
    assert not np.isnat(days["t"]).any()
    assert gaps[0].tolist() == [False, True]


def test_another_packages_network_can_be_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is the part; and where it mixes rows, each row's gradient is still of that row alone."""
    (tmp_path / "fused_nets.py").write_text(
        "from torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.encoder = nn.Linear(2, 1)\n"
        "    def forward(self, x):\n"
        "        return self.encoder(x - x.mean(0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    allow(["fused_nets:Net"])
    table = table_of(lacks={"text": [1]})
    parts = [TEXT, {"kind": "module", "name": "fused_nets:Net", "features": ["a", "b"]}]
    model = fusion(table, parts=parts)
    begun, alone = model.initial(3), make({**parts[1], "target": "y"}, table.schema)
    where = model.layers["encoder.parts.1.encoder.weight"]
    assert np.array_equal(begun[where], alone.initial(4)[alone.layers["encoder.weight"]])
    batch = model.examples(table)
    each = [model.loss_and_gradient(begun, batch.take(slice(i, i + 1)))[1] for i in range(len(batch))]
    wanted = sum(g * min(1, 0.3 / np.linalg.norm(g)) for g in each)
    assert np.allclose(model.clipped_gradient_sum(begun, batch, 0.3)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([{"kind": "linear", "family": "logistic", "features": ["a"]}], "model.bad-part"),
        ([{"kind": "fusion", "parts": [NUMBERS]}], "model.bad-part"),
        ([NUMBERS, {**IMAGE, "norm": "batch"}], "model.bad-part"),
        ([{**IMAGE, "image": "a"}], "plan.bad-column"),
        ([{"kind": "forest"}], "model.unknown"),
        ([{**NUMBERS, "target": "y"}], None),
        ([], None),
    ],
)
def test_parts_that_cannot_be_are_refused_without_data(parts: list[Any], code: str | None) -> None:
    with pytest.raises(PlanError) as caught:
        fusion(table_of(), parts=parts)
    assert code in (None, caught.value.code)


def test_sites_that_lack_modalities_learn_together(federation: Any, tmp_path: Path) -> None:
    """Three offices under secure aggregation: one has no texts, one no numbers, one both."""
    columns = {"says": {"dtype": "text"}, "a": {"range": [0, 9]}, "y": COLUMNS["y"]}
    schema = {"name": "test", "max_rows": 1000, "columns": columns}
    random = np.random.default_rng(0)
    for office, has in {"north": "a", "south": "says", "east": "says a"}.items():
        lines = ["says,a,y"]
        for y in random.integers(0, 2, 60):
            says = random.choice(["flood water", "need help"] if y else ["sun", "lovely beach"])
            a = float(random.uniform(5, 9) if y else random.uniform(0, 4))
            lines.append(f"{says if 'says' in has else ''},{a if 'a' in has else ''},{y}")
        (tmp_path / f"{office}.csv").write_text("\n".join(lines) + "\n")
    parts = [{**TEXT, "buckets": 200}, {"kind": "mlp", "features": ["a"], "hidden": [4]}]
    params = {
        "target": "y", "model": {"kind": "fusion", "parts": parts, "width": 6},
        "rounds": 3, "batch_size": 8, "learning_rate": 1.0, "local_epochs": 2,
    }  # fmt: skip
    plan = federation.plan(
        "horizontal.fedavg", params, {}, schema=schema, run={"holdout": 0.25, "seed": 3}, protection={"sum": "secagg"},
        cohort={"min_sites": 3},
    )  # fmt: skip
    sources = {name: SourceSpec(path=f"{name}.csv") for name in ("north", "south", "east")}
    outcome = federation.run(plan, sources, base=tmp_path)
    assert outcome["evaluation"]["pooled"]["accuracy"] == 1.0
    own = outcome["evaluation"]["own"]
    assert {name: found["accuracy"] for name, found in own.items()} == dict.fromkeys(sources, 1.0)
