"""Where networks compute: the CPU, unless ATOLL_DEVICE asks for a GPU that is there."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import make

torch = pytest.importorskip("torch")

from atoll.models.device import _device, device  # noqa: E402

SCHEMA = TableSchema(
    name="test",
    columns={
        "image": Column(dtype="image", shape=(8, 8)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    },
)
SPEC = {"kind": "cnn", "image": "image", "target": "y", "channels": [4], "norm": "batch"}


def rows() -> Table:
    random = np.random.default_rng(0)
    return Table(SCHEMA, {"image": random.integers(0, 256, (20, 8, 8), np.uint8), "y": np.arange(20) % 2.0})


def test_without_a_gpu_networks_compute_on_the_cpu_with_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ATOLL_DEVICE", "cuda")
    _device.cache_clear()
    with caplog.at_level(logging.WARNING, "atoll.models"):
        models = [make(SPEC, SCHEMA) for _ in range(2)]
    _device.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "ATOLL_DEVICE=cuda, and no GPU is to be had: networks compute on the CPU"
    ]
    assert models[0].device.type == "cpu"
    assert models[0].loss_and_gradient(models[0].initial(0), models[0].examples(rows()))[0] > 0


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_DEVICE", "tpu")
    with pytest.raises(PlanError) as caught:
        make(SPEC, SCHEMA)
    assert caught.value.code == "model.device"
    monkeypatch.delenv("ATOLL_DEVICE")
    assert device().type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_a_gpu_finds_what_the_cpu_finds(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    table, found = rows(), []
    for where in ("cpu", "cuda"):
        monkeypatch.setenv("ATOLL_DEVICE", where)
        model = make({**SPEC, "norm": norm}, SCHEMA)
        weights, batch = model.initial(1), model.examples(table)
        clipped = None if norm == "batch" else model.clipped_gradient_sum(weights, batch, 0.1)
        found.append((model.loss_and_gradient(weights, batch), clipped, model.with_weights(weights).predict(table)))
    (here, clipped_here, told_here), (there, clipped_there, told_there) = found
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert np.allclose(here[1], there[1], atol=1e-3)
    assert np.allclose(told_here, told_there, atol=1e-3)
    if clipped_here is not None and clipped_there is not None:
        assert np.allclose(clipped_here[0], clipped_there[0], atol=1e-3)
        assert abs(clipped_here[1] - clipped_there[1]) <= 1
