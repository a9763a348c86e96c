"""Low-rank adapters: they begin at the base, only they are learned, and they are the paper's formula."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import stored
from atoll.models.batched import batched
from atoll.models.model import Examples, from_spec, make

pytest.importorskip("torch")

SPEC: dict[str, Any] = {
    "kind": "text_transformer", "text": "says", "target": "y", "buckets": 60, "width": 8, "heads": 2, "layers": 2,
    "length": 9,
}  # fmt: skip
LABELS = [1, 1, 1, 0, 0, 0, 1, 0]
ADAPTERS: dict[str, Any] = {"rank": 2, "alpha": 3, "layers": ["*.attention.query", "*.attention.value"]}
ADAPTED = ("attention.query", "attention.value")
BESIDE = "parametrizations.weight.0"


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
    spec = {**SPEC, "base": {**of.named, "adapters": ADAPTERS}, **more}
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
    adapted_layers = [f"encoder.layers.{i}.{layer}.{BESIDE}" for i in range(2) for layer in ADAPTED]
    names = [f"{beside}.{part}" for beside in adapted_layers for part in ("down", "up")]
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
            up, down = (learned[f"{at}.{BESIDE}.{part}"] for part in ("up", "down"))
            merged[f"{at}.weight"] = base.arrays()[f"{at}.weight"] + 3 / 2 * up @ down
            assert abs(up).max() > 1e-3
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
    spec = {**SPEC, "base": {**base.named, "adapters": ADAPTERS}}
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
        adapted(base, width=16)
    assert (caught.value.code, caught.value.field) == ("model.base-unfit", "model.base")
    (tmp_path / "other.safetensors").write_bytes(save({"x": np.zeros(1, np.float32)}))
    for of, code in (({"name": "gone"}, "model.no-base"), ({"name": "other"}, "model.base-changed")):
        with pytest.raises(AtollError) as refused:
            adapted(base, base={**base.named, **of, "adapters": ADAPTERS})
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"layers": ["*.query", "*.querry"]}, "model.no-layer"),
        ({"layers": ["head"]}, "model.no-layer"),
        ({"layers": []}, "plan.bad-value"),
        ({"heads": ["haed"]}, "model.no-layer"),
        ({"rank": 0}, "plan.bad-value"),
    ],
)
def test_adapters_that_fit_no_layer_are_refused(base: Any, more: Any, code: str) -> None:
    with pytest.raises(PlanError) as caught:
        adapted(base, base={**base.named, "adapters": {**ADAPTERS, **more}})
    assert caught.value.code == code
    assert "encoder.layers.0" in caught.value.remedy or "head" in caught.value.remedy or code == "plan.bad-value"


def test_trees_and_frozen_layers_have_no_adapters(base: Any) -> None:
    with pytest.raises(PlanError) as caught:
        adapted(base, base={**base.named, "adapters": ADAPTERS, "frozen": ["encoder"]})
    assert "frozen" in str(caught.value)
    trees = {"kind": "trees", "features": [], "target": "y", "num_trees": 1, "max_depth": 1}
    with pytest.raises(PlanError):
        make({**trees, "base": {**base.named, "adapters": {}}}, table_of().schema)


# ---------------------------------------------------------------- any network

NETS = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.again, self.still, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.again.weight = self.into.weight
        self.still.requires_grad_(False)
    def forward(self, x):
        return self.out(torch.tanh(self.still(self.again(self.into(x)))))

class Steps(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.into = nn.Linear(1, 8)
        self.core = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(8, outputs)
    def forward(self, x):
        return self.out(self.core(self.into(x[:, :, None])).mean(1))
"""
COLUMNS = ("a_lag2", "a_lag1", "a")
ROWS = TableSchema(
    name="test",
    columns={
        **{name: Column(range=(0, 4)) for name in COLUMNS},
        "says": Column(dtype="text"),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    },
)
SERIES: dict[str, Any] = {"kind": "series_transformer", "series": {"a": 3}, "width": 8, "heads": 2, "layers": 1}
TEXT: dict[str, Any] = {key: SPEC[key] for key in ("kind", "text", "buckets", "width", "heads", "length")}
MODULE: dict[str, Any] = {"kind": "module", "name": "lora_nets:Steps", "features": list(COLUMNS)}
FUSION: dict[str, Any] = {"kind": "fusion", "parts": [SERIES, TEXT], "width": 6}
KINDS = {
    "series_transformer": (SERIES, {}), "fusion": (FUSION, {}), "module": (MODULE, {"heads": ["out"]}),
    "mlp": ({"kind": "mlp", "features": list(COLUMNS), "hidden": [5, 4]}, {}),
}  # fmt: skip
MATRICES = {
    "series_transformer": ["tokens", "layers.0.attention.1.ask", "layers.0.attention.1.out",
                           "layers.0.forward_part.1", "layers.0.forward_part.3"],
    "module": ["into", "core.self_attn.in_proj_weight", "core.self_attn.out_proj", "core.linear1", "core.linear2"],
    "mlp": ["encoder.0", "encoder.2"],
}  # fmt: skip


def rows_of(num_rows: int = 24, seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: random.uniform(0, 4, num_rows) for name in COLUMNS}
    words = np.array(["flood at the bridge", "new phone", "sunshine", "we need boats"], object)
    columns["says"] = words[random.integers(0, 4, num_rows)]
    return Table(ROWS, {**columns, "y": (columns["a"] > columns["a_lag2"]).astype(float)})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a spec's model with weights of its own, install it, and give (it, what a spec says of it)."""
    (tmp_path / "lora_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("atoll.models.allowed._NAMES", {"lora_nets:Steps"})
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    importlib.invalidate_caches()

    def installed(spec: dict[str, Any], name: str = "base") -> tuple[Any, dict[str, Any]]:
        made = make({**spec, "target": "y"}, ROWS)
        made = made.with_weights(made.initial(5) + np.random.default_rng(5).normal(0, 0.1, len(made.weights)))
        content = save({layer: np.ascontiguousarray(array) for layer, array in made.arrays().items()})
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        return made, {"name": name, "sha256": hashlib.sha256(content).hexdigest()}

    yield installed
    sys.modules.pop("lora_nets", None)


def moved(model: Any) -> Any:
    """*model* with every weight that it learns moved away from where it begins."""
    weights = model.initial(1)
    return model.with_weights(weights + np.random.default_rng(2).normal(0, 0.3, len(weights)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_with_adapters_is_one_with_summed_matrices(install: Any, kind: str) -> None:
    """W + α / r · B A by numpy, put into a network without adapters: the same predictions, from the base on; and the
    gradients by A and B are the chain rule's of that network's by W."""
    spec, more = KINDS[kind]
    whole, named = install(spec)
    model = make({**spec, "target": "y", "base": {**named, "adapters": {"rank": 3, "alpha": 2, **more}}}, ROWS)
    table, begun = rows_of(), model.with_weights(model.initial(1))
    assert np.allclose(begun.predict(table), whole.predict(table), atol=1e-6)
    model = moved(model)
    learned, held = model.arrays(), dict(whole.arrays())
    downs = [name.removesuffix(".down") for name in learned if name.endswith(".down")]
    of = {beside: beside.replace(".parametrizations", "").removesuffix(".0") for beside in downs}
    assert all(name.split(".")[0] in ("head", "out") for name in learned if ".parametrizations." not in name)
    if kind in MATRICES:
        found = [name.removeprefix("encoder.body.").removesuffix(".weight") for name in of.values()]
        assert sorted(found) == sorted(MATRICES[kind])
    held.update({name: array for name, array in learned.items() if name in held})
    held.update({name: held[name] + 2 / 3 * learned[f"{b}.up"] @ learned[f"{b}.down"] for b, name in of.items()})
    plain = from_spec(whole.spec(), ROWS, held)
    assert np.allclose(model.predict(table), plain.predict(table), atol=1e-6)
    assert abs(model.predict(table) - whole.predict(table)).max() > 0.01
    loss, slope = model.loss_and_gradient(model.weights, model.examples(table))
    other, by_whole = plain.loss_and_gradient(plain.weights, plain.examples(table))
    assert loss == pytest.approx(other, rel=1e-5)
    for beside, name in of.items():
        by_w = by_whole[plain.layers[name]].reshape(held[name].shape)
        for part, wanted in (("up", by_w @ learned[f"{beside}.down"].T), ("down", learned[f"{beside}.up"].T @ by_w)):
            assert np.allclose(slope[model.layers[f"{beside}.{part}"]], 2 / 3 * wanted.ravel(), atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_a_model_that_needs_no_base(
    install: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, more = KINDS[kind]
    whole, named = install(spec)
    model = moved(make({**spec, "target": "y", "base": {**named, "adapters": {"rank": 2, **more}}}, ROWS))
    merged, table = model.whole(), rows_of()
    assert list(merged.arrays()) == list(whole.arrays())
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path / "nowhere"))
    again = from_spec(merged.spec(), ROWS, merged.arrays())
    assert np.allclose(again.predict(table), model.predict(table), atol=1e-6)


@pytest.mark.slow
def test_exported_it_predicts_the_same_without_the_base(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors and as ONNX, of a network of one's own with fused attention."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, named = install(MODULE)
    model = moved(make({**MODULE, "target": "y", "base": {**named, "adapters": {"heads": ["out"]}}}, ROWS))
    about = {"model": {"spec": model.spec(), "layers": list(model.layers)}, "schema": ROWS.model_dump(mode="json")}
    stored.save(tmp_path / "model", about, model.arrays())
    for kind in ("onnx", "safetensors"):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--format", kind])
        assert done.exit_code == 0, done.output
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path / "nowhere"))
    table = rows_of()
    wanted = model.predict(table)
    found = stored.load(tmp_path / "model" / "whole")[0]
    assert np.allclose(found.predict(table), wanted, atol=1e-6)
    session = runtime.InferenceSession(tmp_path / "model" / "model.onnx")
    features = np.column_stack([table[name] for name in COLUMNS])
    assert np.allclose(session.run(["prediction"], {"features": features})[0], wanted, atol=1e-5)


def test_rows_gradients_are_clipped_as_one_after_another_with_fused_attention(install: Any) -> None:
    _, named = install(MODULE)
    model = moved(make({**MODULE, "target": "y", "base": {**named, "adapters": {"heads": ["out"]}}}, ROWS))
    batch = model.examples(rows_of(10))
    each = [model.loss_and_gradient(model.weights, batch.take(slice(i, i + 1)))[1] for i in range(10)]
    clip = float(np.median([np.linalg.norm(gradient) for gradient in each]))
    wanted = sum(g * min(1, clip / np.linalg.norm(g)) for g in each)
    assert np.allclose(model.clipped_gradient_sum(model.weights, batch, clip)[0], wanted, atol=1e-4 * clip)


@pytest.mark.parametrize("kind", ["mlp", "series_transformer", "module"])
def test_sites_in_one_batch_learn_as_one_by_one(install: Any, kind: str) -> None:
    spec, more = KINDS[kind]
    _, named = install(spec)
    model = moved(make({**spec, "target": "y", "base": {**named, "adapters": {"rank": 2, **more}}}, ROWS))
    batch = model.examples(rows_of(6))
    learn = batched(model, batch)
    if learn is None:  # its attention is not done for many weights at once
        assert kind == "module"
        return
    weights = np.stack([model.weights, model.weights * 0.5]).astype(np.float32)
    twice = Examples(tuple(np.stack([x, x]) for x in batch.inputs), np.stack([batch.labels, batch.labels]))
    losses, slopes = learn(weights, twice, np.full(2, 6))
    for own, loss, slope in zip(weights, losses, slopes, strict=True):
        wanted = model.loss_and_gradient(own, batch)
        assert loss == pytest.approx(wanted[0], rel=1e-5)
        assert np.allclose(slope, wanted[1], atol=1e-5)


def test_parts_of_a_fusion_have_adapters_of_their_own_or_the_whole_has(install: Any) -> None:
    text, named = install(TEXT, "text")
    part = {**TEXT, "base": {**named, "adapters": {"rank": 2}}}
    model = make({**FUSION, "target": "y", "parts": [SERIES, part]}, ROWS)
    learned = [name for name in model.layers if name.startswith("encoder.parts.1.")]
    assert learned
    assert all(".parametrizations.weight.0." in name for name in learned)
    assert any(name.startswith("encoder.parts.0.") for name in model.layers)
    began = model.with_weights(model.initial(0))
    assert np.array_equal(began.whole().arrays()["encoder.parts.1.words.weight"], text.arrays()["encoder.words.weight"])
    of = install(FUSION, "whole")[1]
    with pytest.raises(PlanError) as caught:
        make({**FUSION, "target": "y", "parts": [SERIES, part], "base": {**of, "adapters": {}}}, ROWS)
    assert caught.value.code == "model.base-unfit"  # which has no matrices with adapters


def test_what_is_tied_or_never_learned_has_no_adapter(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged, it could not be told."""
    monkeypatch.setattr("atoll.models.allowed._NAMES", {"lora_nets:Tied"})
    whole, named = install({**MODULE, "name": "lora_nets:Tied"})
    assert "still.weight" not in whole.layers
    adapted_to = {**MODULE, "name": "lora_nets:Tied", "target": "y", "base": {**named, "adapters": {"heads": []}}}
    model = moved(make(adapted_to, ROWS))
    assert [name.split(".")[0] for name in model.layers] == ["out", "out"]
    table = rows_of()
    assert np.allclose(model.whole().predict(table), model.predict(table), atol=1e-6)
    adapted_to["base"] = {**named, "adapters": {"heads": ["out"], "layers": ["again"]}}
    with pytest.raises(PlanError) as caught:
        make(adapted_to, ROWS)
    assert caught.value.code == "model.no-layer"


def test_a_network_of_ones_own_says_what_its_head_is(install: Any) -> None:
    _, named = install(MODULE)
    with pytest.raises(PlanError) as caught:
        make({**MODULE, "target": "y", "base": {**named, "adapters": {}}}, ROWS)
    assert caught.value.code == "model.no-layer"
    assert "'out'" in caught.value.remedy
    none = make({**MODULE, "target": "y", "base": {**named, "adapters": {"heads": []}}}, ROWS)
    assert all(".parametrizations." in name for name in none.layers)


def test_a_round_of_full_batches_is_one_central_step_and_only_adapters_travel(install: Any, federation: Any) -> None:
    _, named = install(MODULE)
    adapters = {"rank": 2, "heads": ["out"], "layers": ["core.self_attn*", "core.linear?"]}
    spec = {**MODULE, "base": {**named, "adapters": adapters}}
    tables = {f"s{i}": rows_of(10 * (i + 1), i) for i in range(3)}
    params = {"target": "y", "model": spec, "rounds": 1, "batch_size": 30, "learning_rate": 0.2}
    plan = federation.plan("horizontal.fedavg", params, tables, protection="plain")
    outcome = federation.run(plan, tables)
    model = make({**spec, "target": "y"}, ROWS)
    rows = Table(ROWS, {name: np.concatenate([t[name] for t in tables.values()]) for name in ROWS.columns})
    begun = model.initial(plan.run.seed)
    wanted = begun - 0.2 * model.loss_and_gradient(begun, model.examples(rows))[1]
    assert np.allclose(outcome["result"]["model"].weights, wanted, atol=1e-6)
    num_adapters = 2 * ((8 + 24) + (8 + 8) + (8 + 12) + (12 + 8))
    assert len(model.weights) == num_adapters + 8 + 1
    sizes = {body["bytes"] for body in federation.releases()}
    assert all(4 * len(model.weights) < size < 4 * len(model.weights) + 64 for size in sizes)  # beside it loss, rows
