"""Networks for images: group and batch normalisation, residual blocks, and running statistics among the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table, concatenate
from atoll.models.model import make
from atoll.runtime.study import check_plan

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "cnn": {"kind": "cnn", "channels": [8, 12], "hidden": 6},
    "resnet": {"kind": "resnet", "widths": [4, 8], "blocks": 1},
}


def table_of(n: int = 24, shape: tuple[int, ...] = (12, 10), seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    columns = {
        "image": Column(dtype="image", shape=shape),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    }
    images, labels = random.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 2.0
    images[labels == 1, 1::2] = images[labels == 1, ::2]  # coarser from top to bottom
    return Table(TableSchema(name="test", columns=columns), {"image": images, "y": labels})


def made(kind: str, norm: str, table: Table, **more: Any) -> Any:
    return make({**KINDS[kind], "image": "image", "target": "y", "norm": norm, **more}, table.schema)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "group"])
def test_a_row_has_a_gradient_of_its_own(kind: str, norm: str) -> None:
    table = table_of(6)
    model = made(kind, norm, table)
    weights, batch = model.initial(1), model.examples(table)
    assert model.running == slice(len(weights), len(weights))
    each = [model.loss_and_gradient(weights, batch.take(slice(i, i + 1)))[1] for i in range(6)]
    assert np.allclose(model.loss_and_gradient(weights, batch)[1], np.mean(each, 0), atol=1e-5)
    clip = float(np.median([np.linalg.norm(one) for one in each]))
    wanted = sum(one * min(1, clip / np.linalg.norm(one)) for one in each)
    total, clipped, _ = model.clipped_gradient_sum(weights, batch, clip)
    assert np.allclose(total, wanted, atol=3e-5 * np.linalg.norm(wanted))
    assert clipped == 3


def test_a_row_that_overflows_counts_as_nothing() -> None:
    table = table_of(4)
    model = made("cnn", "none", table)
    weights, batch = model.initial(0), model.examples(table)
    weights[model.layers["encoder.0.weight"]] *= 1e30
    weights[model.layers["encoder.4.weight"]] *= 1e30
    total, clipped, _ = model.clipped_gradient_sum(weights, batch, 1.0)
    assert clipped == 4
    assert (total == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_normalisation_steps_as_pytorch_does(kind: str) -> None:
    """Its running mean and variance go where PyTorch's own go, whatever the learning rate."""
    table = table_of()
    model = made(kind, "batch", table)
    weights, batch = model.initial(3), model.examples(table)
    twin = made(kind, "batch", table).net  # the same layers, trained in the ordinary way
    state = twin.state_dict()
    for name, where in model.layers.items():
        state[name] = torch.from_numpy(weights[where].astype(np.float32)).reshape(state[name].shape)
    twin.load_state_dict(state)
    twin.train()
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    ours = weights.astype(np.float32)
    for start in range(0, 24, 8):
        some = batch.take(slice(start, start + 8))
        _, gradient = model.loss_and_gradient(ours, some)
        step = np.float32(0.1) * gradient
        step[model.running] = gradient[model.running]
        ours = ours - step
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(
            twin(*model.tensors(some.inputs))[:, 0], torch.from_numpy(some.labels).float()
        ).backward()
        optimiser.step()
    found = torch.cat([twin.state_dict()[name].reshape(-1) for name in model.layers]).numpy()
    assert model.running.stop - model.running.start == len(found[model.running]) > 0
    assert np.allclose(ours, found, atol=2e-5)
    assert (found[model.running] != weights[model.running]).all()


def test_one_row_is_normalised_by_the_running_statistics() -> None:
    table = table_of()
    model = made("cnn", "batch", table)
    weights, one = model.initial(0), model.examples(table).take(slice(3, 4))
    loss, gradient = model.loss_and_gradient(weights, one)
    probability = model.with_weights(weights).predict(table)[3]
    assert loss == pytest.approx(-np.log(probability if table["y"][3] else 1 - probability), rel=1e-4)
    assert (gradient[model.running] == 0).all()
    assert np.abs(gradient).max() > 0


def test_sites_running_statistics_are_averaged(drive: Any) -> None:
    """One full step from the same weights: the cohort's running mean is the row-weighted mean of the sites'."""
    from atoll.contract.program import Cohort, build

    tables = {"a": table_of(20, seed=1), "b": table_of(40, seed=2)}
    tables["b"]["image"][:] //= 2  # a darker scanner
    model = {**KINDS["cnn"], "image": "image", "norm": "batch"}
    params = {"target": "y", "model": model, "rounds": 1, "batch_size": 64, "learning_rate": 0.1}
    schema = tables["a"].schema
    steps = build("horizontal.fedavg", params).coordinate(Cohort(("a", "b"), schema, seed=5))
    fitted = drive(steps, tables).result["model"]
    start = fitted.initial(5).astype(np.float32)
    moved = {}
    for name, table in tables.items():
        moved[name] = fitted.loss_and_gradient(start, fitted.examples(table))[1][fitted.running]
    wanted = start[fitted.running] - (20 * moved["a"] + 40 * moved["b"]) / 60
    assert np.allclose(fitted.weights[fitted.running], wanted, atol=1e-6)
    assert not np.allclose(moved["a"], moved["b"], atol=1e-3)
    one_row = concatenate([table_of(1)])
    assert drive(
        build("horizontal.fedavg", params).coordinate(Cohort(("a",), schema)), {"a": one_row}
    ).result["history"]  # fmt: skip


@pytest.mark.parametrize("program", ["horizontal.dpsgd", "horizontal.dpftrl"])
def test_batch_normalisation_is_refused_with_the_plan_where_rows_are_clipped(program: str) -> None:
    def check(norm: str) -> None:
        params = {"target": "y", "model": {"kind": "resnet", "image": "image", "norm": norm}, "expected_rows": 100}
        schema = table_of().schema.model_dump(mode="json")
        content = {"atoll": 1, "name": "test", "protection": "plain", "cohort": {"min_sites": 1}}
        check_plan(Plan.from_json({**content, "program": program, "params": params, "schema": schema}))

    check("group")
    with pytest.raises(PlanError) as caught:
        check("batch")
    assert (caught.value.code, caught.value.field) == ("model.mixes-rows", "model.norm")


def test_a_residual_network_of_zero_blocks_is_its_first_convolution() -> None:
    """With the second convolution of each block zero, a block is the identity: relu(0 + x)."""
    table = table_of(5, (8, 8, 3))
    model = make({"kind": "resnet", "image": "image", "target": "y", "widths": [4], "blocks": 2, "norm": "none"},
                 table.schema)  # fmt: skip
    weights = model.initial(2)
    for name, where in model.layers.items():
        if ".inner.2." in name:
            weights[where] = 0
    fitted = model.with_weights(weights)
    shapes = fitted.arrays()
    [x] = model.tensors(model.inputs(table))
    first = F.relu(F.conv2d(x, *(torch.from_numpy(shapes[f"encoder.0.{n}"]) for n in ("weight", "bias")), padding=1))
    odds = F.linear(first.mean((2, 3)), *(torch.from_numpy(shapes[f"head.{n}"]) for n in ("weight", "bias")))
    assert np.allclose(fitted.predict(table), odds.sigmoid()[:, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (4, 1), (8, 2), (16, 4), (64, 16), (256, 32)])
def test_groups_have_four_channels_or_more(channels: int, groups: int) -> None:
    from atoll.models.images import normalised

    [layer] = normalised("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


def test_resnets_learn() -> None:
    table = table_of(60)
    model = made("resnet", "group", table)
    weights, batch = model.initial(0).astype(np.float32), model.examples(table)
    losses = []
    for _ in range(60):
        loss, gradient = model.loss_and_gradient(weights, batch)
        losses.append(loss)
        weights = weights - np.float32(0.3) * gradient
    assert losses[-1] < 0.6 * losses[0]
