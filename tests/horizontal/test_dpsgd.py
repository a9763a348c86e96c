"""DP-SGD without its noise is clipped SGD on the pooled sample; the sample is secret, and Poisson."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from atoll.contract.errors import DisclosureError, PlanError
from atoll.contract.fields import as_arrays
from atoll.contract.program import Cohort, Program, build, handler_of
from atoll.contract.rounds import Checkpoint, Metrics, Round, Summed, Task, TaskId
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table, concatenate
from atoll.horizontal.dpsgd import poisson_sample

COLUMNS = {
    "u": Column(range=(-4, 4)),
    "v": Column(range=(0, 10)),
    "image": Column(dtype="image", shape=(6, 6)),
    "y": Column(dtype="integer", values=(0, 1), role="label"),
}
SCHEMA = TableSchema(name="test", max_rows=1000, columns=COLUMNS)
LINEAR: dict[str, Any] = {"target": "y", "family": "logistic", "features": ["u", "v"], "expected_rows": 165}
CNN: dict[str, Any] = {
    "target": "y",
    "model": {"kind": "cnn", "image": "image", "channels": [3], "hidden": 4},
    "expected_rows": 165,
}


class Stream:
    """A site's secret, in a test: bytes by seed."""

    def __init__(self, *seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def bytes(self, size: int) -> bytes:
        return self.random.bytes(size)


class Desk:
    """A site as a handler sees it."""

    def __init__(self, name: str, table: Table, min_group_size: int = 1) -> None:
        self.name, self.table, self.holdout, self.min_group_size = name, table, table, min_group_size
        self.told: list[tuple[float, float]] = []

    def progress(self, done: float, total: float) -> None:
        self.told.append((done, total))


def task_of(name: str, number: int, sent: Mapping[str, Any] | None = None) -> Task:
    """The same secret for the same round of the same site."""
    return Task(
        TaskId("0" * 32, number, 0, "reply", name), dict(sent or {}), (0,), lambda label: Stream(number, *name.encode())
    )


def sites(sizes: tuple[int, ...] = (40, 25, 100)) -> dict[str, Table]:
    random, tables = np.random.default_rng(0), {}
    for i, n in enumerate(sizes):
        u, v, image = random.uniform(-4, 4, n), random.uniform(0, 10, n), random.integers(0, 256, (n, 6, 6), np.uint8)
        y = (random.random(n) < 1 / (1 + np.exp(-2 * u))).astype(float)
        tables[f"s{i}"] = Table(SCHEMA, {"u": u, "v": v, "image": image, "y": y})
    return tables


def run(program: Program, desks: Mapping[str, Desk], start: Any = None, first: int = 0) -> tuple[Any, list[Any]]:
    """(result, everything yielded): the program's two halves against each other, without noise."""
    steps: Any = program.coordinate(Cohort(tuple(desks), SCHEMA, seed=3), start)
    value, seen, number = None, [], first
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            return stop.value, seen
        seen.append(item)
        value = None
        if isinstance(item, Round):
            answer, total = handler_of(program, item.name).answer, dict[str, Any]()
            for name, desk in desks.items():
                reply = as_arrays(answer(program, desk, task_of(name, number, item.send)), item.reply)  # type: ignore[arg-type]
                for field, array in reply.items():
                    assert np.abs(array).max() <= (item.reply[field].bound or 0)
                    total[field] = total.get(field, 0) + array
            value, number = Summed(total, tuple(desks)), number + 1


@pytest.mark.parametrize("params", [LINEAR, CNN], ids=["linear", "cnn"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_noise_it_is_clipped_sgd_on_the_pooled_sample(params: dict[str, Any], momentum: float) -> None:
    """Written a second time: one gradient after another, of the rows that the sites' secrets choose."""
    if "model" in params:
        pytest.importorskip("torch")
    tables, clip, rate = sites(), 0.4, 0.3
    more = {"rounds": 6, "sampling_rate": rate, "clip_norm_l2": clip, "learning_rate": 0.7, "decay": 0.1}
    program: Any = build("horizontal.dpsgd", {**params, **more, "momentum": momentum})
    result, _ = run(program, {name: Desk(name, table) for name, table in tables.items()})
    model = program.model(SCHEMA)
    weights, velocity = model.initial(3), 0.0
    for number in range(6):
        total = np.zeros(len(weights))
        for name, table in tables.items():
            examples = model.examples(table)
            for row in poisson_sample(len(table), rate, task_of(name, number)):
                _, gradient = model.loss_and_gradient(weights, examples.take(np.array([row])))
                total += gradient * min(1, clip / np.linalg.norm(gradient))
        velocity = momentum * velocity + total / (rate * 165)
        weights = weights - 0.7 / (1 + 0.1 * number) * velocity
    tolerance = 1e-12 if params is LINEAR else 2e-5
    assert np.allclose(result["model"].weights, weights, rtol=0, atol=tolerance)
    assert ("coefficients" in result) == (params is LINEAR)


def test_nothing_but_the_clipped_sum_leaves_and_its_norm_is_declared() -> None:
    """No loss, no rows, no size of the sample, not in progress either."""
    desks = {name: Desk(name, table) for name, table in sites().items()}
    program: Any = build("horizontal.dpsgd", {**LINEAR, "rounds": 2, "clip_norm_l2": 0.2})
    _, seen = run(program, desks)
    rounds = [item for item in seen if isinstance(item, Round)]
    assert [set(item.reply) for item in rounds] == [{"gradient"}] * 2
    assert [item.values.keys() for item in seen if isinstance(item, Metrics)] == [{"gradient_norm_l2"}] * 2
    assert {told for desk in desks.values() for told in desk.told} == {(0, 1)}
    declared = handler_of(program, "gradient").record
    norms = declared(program, SCHEMA, {"clip": np.array(0.2)})  # type: ignore[misc]
    assert norms["gradient"].l2 == 0.2
    assert program.sampling_rate == 0.05
    pooled, weights = concatenate(list(sites().values())), np.array([0.1, -2.0, 3.0])
    model = program.model(SCHEMA)
    for row in range(len(pooled)):
        alone = model.clipped_gradient_sum(weights, model.examples(pooled).take(np.array([row])), 0.2)[0]
        assert np.linalg.norm(alone) <= 0.2 * (1 + 1e-12)
        assert np.abs(alone).sum() <= norms["gradient"].l1


def test_the_sample_is_poisson_and_the_secrets_own() -> None:
    drawn = [poisson_sample(200, 0.1, task_of("s0", number)) for number in range(400)]
    sizes = np.array([len(sample) for sample in drawn])
    assert stats.kstest(sizes + np.random.default_rng(0).uniform(-0.5, 0.5, 400),
                        lambda x: stats.norm(20, np.sqrt(18)).cdf(x)).pvalue > 1e-3  # fmt: skip
    often = np.bincount(np.concatenate(drawn), minlength=200)
    assert stats.chisquare(often).pvalue > 1e-3
    again = poisson_sample(200, 0.1, task_of("s0", 7))
    assert again.tolist() == drawn[7].tolist()
    assert poisson_sample(200, 0.1, task_of("s1", 7)).tolist() != drawn[7].tolist()
    assert poisson_sample(5, 1.0, task_of("s0", 0)).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5, task_of("s0", 0)).tolist() == []


def test_sites_without_a_sample_answer_zero() -> None:
    tables = sites((40, 2))
    tables["none"] = tables["s0"].rows(np.zeros(40, bool))
    program = build("horizontal.dpsgd", {**LINEAR, "rounds": 1, "sampling_rate": 1e-9})
    result, _ = run(program, {name: Desk(name, table) for name, table in tables.items()})
    assert result["model"].weights.tolist() == [0, 0, 0]


def test_a_gradient_of_few_people_is_not_told_where_others_see_it() -> None:
    desks = {"s0": Desk("s0", sites()["s0"], min_group_size=30)}
    with pytest.raises(DisclosureError) as caught:
        run(build("horizontal.dpsgd", {**LINEAR, "rounds": 1, "sampling_rate": 0.3}), desks)
    assert caught.value.code == "disclosure.small-group"


def test_resuming_from_a_checkpoint_gives_the_same_bits() -> None:
    desks = {name: Desk(name, table) for name, table in sites().items()}
    params = {**LINEAR, "rounds": 7, "momentum": 0.5, "decay": 0.2, "checkpoint_every": 3}
    whole, seen = run(build("horizontal.dpsgd", params), desks)
    checkpoints = [item for item in seen if isinstance(item, Checkpoint)]
    assert len(checkpoints) == 2
    for i, checkpoint in enumerate(checkpoints):
        resumed, _ = run(build("horizontal.dpsgd", params), desks, dict(checkpoint.state), first=3 * (i + 1))
        assert resumed["model"].weights.tobytes() == whole["model"].weights.tobytes()
        assert resumed["history"] == whole["history"]


@pytest.mark.parametrize(
    "change", [{"sampling_rate": 0}, {"sampling_rate": 1.5}, {"clip_norm_l2": 0}, {"expected_rows": None}]
)
def test_parameters_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("horizontal.dpsgd", {**LINEAR, **change})


def test_the_clip_moves_to_the_quantile_of_the_norms() -> None:
    """Andrew et al. 2021: from far too small, and from far too large, to where half of the rows are below it."""
    tables, found = sites((300, 300)), []
    for first in (0.01, 50.0):
        more = {"rounds": 60, "sampling_rate": 1.0, "expected_rows": 600, "learning_rate": 1e-6, "clip_quantile": 0.5}
        program: Any = build("horizontal.dpsgd", {**LINEAR, **more, "clip_norm_l2": first})
        _, seen = run(program, {name: Desk(name, table) for name, table in tables.items()})
        found.append(float([item for item in seen if isinstance(item, Round)][-1].send["clip"]))
    model, pooled = program.model(SCHEMA), concatenate(list(tables.values()))
    examples = model.examples(pooled)
    norms = [
        np.linalg.norm(model.loss_and_gradient(model.initial(3), examples.take(np.array([row])))[1])
        for row in range(len(pooled))
    ]
    assert found == pytest.approx([np.median(norms)] * 2, rel=0.15)
    declared = handler_of(program, "gradient").record
    told = declared(program, SCHEMA, {"clip": np.array(0.3)})  # type: ignore[misc]
    assert told["gradient"].l2 == 0.3 and told["votes"].l2 == 0.5 and told["votes"].share < 0.1
