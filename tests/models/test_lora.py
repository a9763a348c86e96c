"""Low-rank adapters: they begin at the base, only they are learned, and they are the paper's formula."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from atoll.contract.errors import IntegrityError, PlanError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import from_spec, make

pytest.importorskip("torch")

SPEC: dict[str, Any] = {
    "kind": "text_transformer", "text": "says", "target": "y", "buckets": 60, "width": 8, "heads": 2, "layers": 2,
    "length": 9,
}  # fmt: skip
LABELS = [1, 1, 1, 0, 0, 0, 1, 0]
ADAPTED = ("attention.query", "attention.value")


def table_of(values: tuple[int, ...] = (0, 1)) -> Table:
    texts = [
        "flood water is rising at the bridge", "the bridge is closed", "we need boats and food", "lovely sunshine",
        "sunshine at the beach", "new phone", "boats at the bridge", "lovely food; the beach too",
    ]  # fmt: skip
    label = Column(dtype="integer", values=values, role="label")
    schema = TableSchema(name="test", columns={"says": Column(dtype="text"), "y": label})
    return Table(schema, {"says": np.array(texts, object), "y": np.array(LABELS, float)})


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A transformer, installed here; what a spec says of it is ``base.named``."""
    fitted = make(SPEC, table_of().schema)
    fitted = fitted.with_weights(fitted.initial(5))
    content = save({name: np.ascontiguousarray(array) for name, array in fitted.arrays().items()})
    (tmp_path / "words.safetensors").write_bytes(content)
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    fitted.named = {"name": "words", "sha256": hashlib.sha256(content).hexdigest()}
    return fitted


def adapted(of: Any, table: Table | None = None, **more: Any) -> Any:
    spec = {**SPEC, "base": of.named, "adapters": {"rank": 2, "alpha": 3}, **more}
    return make(spec, (table or table_of()).schema)


def test_the_start_is_the_base(base: Any) -> None:
    table, model = table_of(), adapted(base)
    weights = model.initial(1)
    assert model.with_weights(weights).predict(table).tobytes() == base.predict(table).tobytes()
    downs = [name for name in model.layers if name.endswith(".down")]
    assert all(weights[model.layers[name]].std() > 0.1 for name in downs)
    assert weights.tobytes() != model.initial(2).tobytes()


def test_only_adapters_and_the_head_are_learned(base: Any) -> None:
    model = adapted(base)
    names = [f"encoder.layers.{i}.{layer}.{part}" for i in range(2) for layer in ADAPTED for part in ("down", "up")]
    assert list(model.layers) == [*names, "head.weight", "head.bias"]
    assert len(model.weights) == 4 * 2 * (2 * 8) + 8 + 1  # layers · r · (inputs + outputs) + head
    assert set(model.arrays()) == set(model.layers)


def test_adapters_are_the_papers_formula(base: Any) -> None:
    """Hu et al. 2022, equation 3: the same as a network whose weight is W + α / r · B A."""
    table, model = table_of(), adapted(base)
    weights, batch = model.initial(1), model.examples(table)
    for _ in range(30):
        weights -= 0.3 * model.loss_and_gradient(weights, batch)[1]
    learned = dict(model.with_weights(weights).arrays())
    merged = {**base.arrays(), "head.weight": learned["head.weight"], "head.bias": learned["head.bias"]}
    for i in range(2):
        for layer in ADAPTED:
            at = f"encoder.layers.{i}.{layer}"
            merged[f"{at}.weight"] = base.arrays()[f"{at}.weight"] + 3 / 2 * learned[f"{at}.up"] @ learned[f"{at}.down"]
            assert abs(learned[f"{at}.up"]).max() > 1e-3
    found = model.with_weights(weights).predict(table)
    assert np.allclose(found, from_spec(SPEC, table.schema, merged).predict(table), atol=1e-6)
    assert ((found > 0.5) == np.array(LABELS)).all()
    assert abs(found - base.predict(table)).max() > 0.1


def test_clipping_equals_clipping_one_after_another(base: Any) -> None:
    table, model = table_of(), adapted(base)
    weights, batch = model.initial(1), model.examples(table)
    weights += np.random.default_rng(0).normal(0, 0.1, len(weights))
    each = [model.loss_and_gradient(weights, batch.take(slice(i, i + 1))) for i in range(len(batch))]
    norms = np.array([np.linalg.norm(gradient) for _, gradient in each])
    clip = 1.01 * float(np.median(norms))
    wanted = sum(g * min(1, clip / n) for (_, g), n in zip(each, norms, strict=True))
    total, clipped, _ = model.clipped_gradient_sum(weights, batch, clip)
    assert np.allclose(total, wanted, rtol=0, atol=3e-5 * np.linalg.norm(wanted))
    assert clipped == (norms > clip).sum()


def test_only_adapters_travel(base: Any, drive: Any) -> None:
    tables = {f"office{i}": table_of().rows(np.arange(8) % 4 != i) for i in range(3)}
    spec = {**SPEC, "base": base.named, "adapters": {"rank": 2, "alpha": 3}}
    del spec["target"]
    params = {"target": "y", "model": spec, "rounds": 20, "batch_size": 4, "learning_rate": 0.3, "local_epochs": 2}
    driven = drive(
        build("horizontal.fedavg", params).coordinate(Cohort(tuple(tables), table_of().schema, seed=1)), tables
    )
    assert all(asked.reply["weights"].shape == (137,) == asked.send["weights"].shape for asked in driven.rounds)
    fitted = driven.result["model"]
    assert ((fitted.predict(table_of()) > 0.5) == np.array(LABELS)).all()
    again = from_spec(fitted.spec(), table_of().schema, fitted.arrays())
    assert np.allclose(again.predict(table_of()), fitted.predict(table_of()), atol=1e-6)


def test_a_base_can_also_be_learned_on_as_a_whole(base: Any) -> None:
    table = table_of()
    model = make({**SPEC, "base": base.named}, table.schema)
    assert model.with_weights(model.initial(9)).predict(table).tobytes() == base.predict(table).tobytes()
    assert len(model.weights) == len(base.weights)


def test_another_targets_head_begins_anew(base: Any) -> None:
    classes = table_of((3, 0, 1))
    model = adapted(base, classes)
    assert model.with_weights(model.initial(1)).predict(classes).shape == (8, 3)
    base.load(base.weights)
    inner, same = (m.net.encoder(*m.tensors(m.inputs(classes))).detach() for m in (model, base))
    assert np.allclose(inner, same, atol=1e-6)


def test_a_base_that_cannot_be_is_refused(base: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        adapted(base, base=None)
    assert "base" in str(caught.value)
    with pytest.raises(PlanError) as caught:
        adapted(base, width=16)
    assert (caught.value.code, caught.value.field) == ("model.base-unfit", "model.base")
    with pytest.raises(PlanError) as caught:
        adapted(base, base={**base.named, "name": "gone"})
    assert caught.value.code == "model.no-base"
    (tmp_path / "other.safetensors").write_bytes(save({"x": np.zeros(1, np.float32)}))
    with pytest.raises(IntegrityError) as changed:
        adapted(base, base={**base.named, "name": "other"})
    assert changed.value.code == "model.base-changed"
