"""FedRep: the paper's algorithm written a second time, and the paper's own toy, a linear representation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from atoll.contract.program import Cohort, build
from atoll.models.model import KINDS, Settings

SETTINGS = {"rounds": 4, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.3}


def test_it_is_the_papers_algorithm(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    driven = study.train(drive, "horizontal.fedrep", study.params(**SETTINGS, head_epochs=3))
    body, heads = np.zeros(2), dict.fromkeys(study.tables, 0.0)
    for number in range(4):
        changes = {}
        for site in study.tables:
            headed = study.sgd(site, [heads[site], *body], study.batches(site, number, 8, 3, part=1), 0.3, still=[1, 2])
            trained = study.sgd(site, headed, study.batches(site, number, 8), 0.3, still=[0])
            heads[site], changes[site] = trained[0], trained[1:] - body
        body = body + study.mean(changes)
    assert np.allclose(driven.result["model"].weights, [0, *body], rtol=0, atol=1e-12)
    for site, desk in driven.desks.items():
        own = study.sgd(site, [heads[site], *body], study.batches(site, 4, 8, 3, part=1), 0.3, still=[1, 2])
        assert np.allclose(desk.personal["weights"], own, rtol=0, atol=1e-12)
        assert np.allclose(desk.state["own"], heads[site], rtol=0, atol=1e-12), "to personalise is no round"


def test_without_personal_layers_it_is_fedavg_bit_for_bit(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    found = study.train(drive, "horizontal.fedrep", study.params(**SETTINGS, personal_layers=[])).result
    fedavg = study.train(drive, "horizontal.fedavg", study.params(**SETTINGS)).result
    assert found["model"].weights.tobytes() == fedavg["model"].weights.tobytes()


# ---------------------------------------------------------------- §5: y = wᵢᵀ Bᵀ x

DIM, WIDTH, ROWS, SITES = 8, 2, 14, 12
NAMES = [f"x{i}" for i in range(DIM)]


class _Spec(Settings):
    kind: Literal["two_layers"] = "two_layers"


@pytest.fixture
def _two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of the test's own: two linear layers, x ↦ wᵀ Bᵀ x."""
    torch = pytest.importorskip("torch")
    from atoll.models.network import Joined, Network

    class TwoLayers(Network):
        Spec: ClassVar[type[_Spec]] = _Spec

        def built(self) -> Any:
            joined = Joined(torch.nn.Linear(DIM, WIDTH, bias=False), WIDTH, 1)
            joined.head = torch.nn.Linear(WIDTH, 1, bias=False)
            return joined

        def inputs(self, table: Any) -> Any:
            return (np.column_stack([table[name] for name in NAMES]).astype(np.float32),)

        def tensors(self, inputs: Any) -> Any:
            return (torch.from_numpy(inputs[0]),)

    monkeypatch.setitem(KINDS, "two_layers", TwoLayers)


@pytest.mark.usefixtures("_two_layers")
def test_it_finds_the_representation_that_all_tasks_share(federation: Any, drive: Any) -> None:
    """Few rows at each site for what it would have to learn alone, and many for what is left to it."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(DIM, WIDTH)))[0]
    columns = {**{name: {"range": [-2, 2]} for name in NAMES}, "y": {"range": [-1, 1], "role": "label"}}
    tables, truth = {}, {}
    for i in range(SITES):
        x, head = random.normal(0, 0.3, (ROWS, DIM)).clip(-2, 2), random.normal(0, 0.8, WIDTH)
        truth[f"s{i:02}"] = basis @ head
        y = (x @ basis @ head + random.normal(0, 0.06, ROWS)).clip(-1, 1)
        tables[f"s{i:02}"] = federation.table({**dict(zip(NAMES, x.T, strict=True)), "y": y}, columns)
    params = {"target": "y", "model": {"kind": "two_layers"}, "batch_size": ROWS, "learning_rate": 3.0}
    params |= {"rounds": 50, "head_epochs": 2, "local_epochs": 3}
    cohort = Cohort(tuple(tables), tables["s00"].schema, seed=2)
    driven = drive(build("horizontal.fedrep", params).coordinate(cohort), tables)
    model = driven.result["model"]

    def body(weights: np.ndarray) -> np.ndarray:
        return weights[model.layers["encoder.weight"]].reshape(WIDTH, DIM)

    def apart(found: np.ndarray) -> float:
        """The paper's principal angle distance, ‖B̂⊥ᵀ B‖₂."""
        q = np.linalg.qr(found.T)[0]
        return float(np.linalg.norm(basis - q @ (q.T @ basis), 2))

    assert apart(body(model.initial(2))) > 0.7
    assert apart(body(model.weights)) < 0.15
    errors: dict[str, list[float]] = {"fedrep": [], "alone": []}
    for site, desk in driven.desks.items():
        weights = desk.personal["weights"]
        slope = weights[model.layers["head.weight"]] @ body(weights)
        x = np.column_stack([tables[site][name] for name in NAMES])
        alone = np.linalg.lstsq(x, tables[site]["y"], rcond=None)[0]
        errors["fedrep"].append(float(np.linalg.norm(slope - truth[site])))
        errors["alone"].append(float(np.linalg.norm(alone - truth[site])))
    assert np.mean(errors["fedrep"]) < 0.6 * np.mean(errors["alone"]), errors
