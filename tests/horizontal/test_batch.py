"""Sites that take their steps together send what each sends alone: every algorithm, unlike sizes, all rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.fields import as_arrays
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Gather, Gathered, Round, Summed, Task, TaskId
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.horizontal import batch
from atoll.horizontal.batch import batched

FEATURES = ["u", "v", "w"]
SCHEMA = TableSchema(
    name="test",
    columns={**{name: Column(range=(-4, 4)) for name in FEATURES},
             "sick": Column(dtype="integer", values=(0, 1), role="label")},
)  # fmt: skip
SIZES = (23, 1, 40, 10, 31, 7)
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"family": "logistic", "features": FEATURES},
    "mlp": {"model": {"kind": "mlp", "features": FEATURES, "hidden": [6]}},
    "mlp, batch norm": {"model": {"kind": "mlp", "features": FEATURES, "hidden": [6], "norm": "batch"}},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg, momentum": {"momentum": 0.9, "weight_decay": 0.01, "decay": 0.1},
    "fedavg, local steps": {"local_steps": 9, "freeze": ["head"]},
    "fedprox": {"proximal": 0.3},
    "scaffold": {},
    "scaffold, momentum": {"momentum": 0.5, "clip_norm_l2": 0.05},
    "fednova": {"momentum": 0.5},
    "feddyn": {"clip_norm_l2": 0.05},
    "fedadam": {},
    "ditto": {},
    "fedper": {},
    "fedrep": {},
    "finetune": {},
    "apfl": {},
    "perfedavg": {},
    "ifca": {},
    "moon": {},
    "cyclic": {},
}
FAR = {"linear": 1e-12, "mlp": 2e-5, "mlp, batch norm": 0.0}
"""Of the largest number in what a site sends in a round."""


def tables(sizes: tuple[int, ...] = SIZES) -> dict[str, Table]:
    random, found = np.random.default_rng(3), {}
    for place, n in enumerate(sizes):
        x = np.clip(random.normal(0, 1.5, (n, 3)), -4, 4)
        y = (x @ [1.0, -1.0, 0.5 * place - 1] + random.normal(0, 1, n) > 0).astype(float)
        found[f"s{place}"] = Table(SCHEMA, {**dict(zip(FEATURES, x.T, strict=True)), "sick": y})
    return found


def learned(
    drive: Any, program: str, params: Mapping[str, Any], own: Mapping[str, Table], *, together: bool
) -> list[dict[str, Any]]:
    """The replies of every round, by site; rounds are driven here, and not by ``drive``, which asks one by one."""
    made, views = build(program, params), drive(iter_of_nothing(), own).desks
    steps, value, number = made.coordinate(Cohort(tuple(own), SCHEMA)), None, 0
    replies: list[dict[str, Any]] = []
    while True:
        try:
            item = steps.send(value)
        except StopIteration:
            return replies
        value = None
        if not isinstance(item, Round):
            continue
        sites = list(own) if item.sites is None else list(item.sites)
        sent = {k: np.asarray(v) for k, v in item.send.items()}
        tasks = [Task(TaskId("0" * 32, number, 0, "reply", n), sent, (number, *n.encode())) for n in sites]
        asked: Callable[..., list[Any]] | None = batched(made, item.name) if together else None
        if asked is not None:
            answers = asked([views[name] for name in sites], tasks)
        else:
            answer = handler_of(made, item.name).answer
            answers = [answer(made, views[name], task) for name, task in zip(sites, tasks, strict=True)]
        found = {name: as_arrays(one, item.reply) for name, one in zip(sites, answers, strict=True)}
        replies.append(found)
        number += 1
        if isinstance(item.reduce, Gather):
            value = Gathered(found)
        else:
            value = Summed({f: sum(one[f] for one in found.values()) for f in item.reply}, tuple(found))


def iter_of_nothing() -> Any:
    return
    yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites took their steps at once, call by call."""
    seen: list[int] = []
    steps = batch.steps

    def counted(asked: Any, learn: Any) -> Any:
        seen.append(len(asked))
        return steps(asked, learn)

    monkeypatch.setattr(batch, "steps", counted)
    return seen


@pytest.mark.parametrize(
    ("algorithm", "model"),
    [*((one, model) for one in ALGORITHMS for model in ("linear", "mlp")), ("fedavg", "mlp, batch norm")],
)
def test_replies_are_those_of_sites_alone(drive: Any, taken: list[int], algorithm: str, model: str) -> None:
    program = f"horizontal.{algorithm.partition(',')[0]}"
    params = {"target": "sick", "rounds": 3, "local_epochs": 2, "batch_size": 10, "learning_rate": 0.1}
    params |= {**MODELS[model], **ALGORITHMS[algorithm]}
    if algorithm == "moon" and model == "linear":
        pytest.skip("a linear model has no representation")
    alone = learned(drive, program, params, tables(), together=False)
    assert not taken
    together = learned(drive, program, params, tables(), together=True)
    assert len(together) == len(alone)
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.keys() == other.keys()
        for site, fields in other.items():
            for name, value in fields.items():
                far = FAR[model] * max(1.0, float(np.abs(value).max(initial=0)))
                assert np.abs(one[site][name] - value).max(initial=0) <= far, (number, site, name)
    cannot = algorithm == "moon" or model == "mlp, batch norm"
    assert (not taken) if cannot else (max(taken) == (1 if algorithm == "cyclic" else len(SIZES)))


def test_few_sites_fit_at_once(drive: Any, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and with so little room that handlers wait two by two, the outcome is the same."""
    params = {"target": "sick", "rounds": 2, "batch_size": 10, **MODELS["mlp"]}
    whole = learned(drive, "horizontal.fedrep", params, tables(), together=True)
    before = list(taken)
    monkeypatch.setattr(batch, "AT_ONCE_BYTES", 3 * 4 * (4 * 31 + 4 * 10 * 3))
    monkeypatch.setattr(batch, "AHEAD_BYTES", 1)
    monkeypatch.setattr(batch, "WAITING_BYTES", 1500)
    pieces = learned(drive, "horizontal.fedrep", params, tables(), together=True)
    assert max(before) == 6 and max(taken[len(before) :]) <= 3
    for one, other in zip(pieces, whole, strict=True):
        for site in one:
            for name in one[site]:
                assert np.allclose(one[site][name], other[site][name], rtol=0, atol=1e-4)


def test_a_site_that_diverges_is_alone_with_it(drive: Any) -> None:
    own = tables()
    far = {**own["s2"].columns, "u": np.full(40, 4.0), "v": np.full(40, -4.0)}
    own["s2"] = replace(own["s2"], columns=far)
    params = {"target": "sick", "family": "linear", "features": FEATURES, "learning_rate": 1.0, "local_steps": 900}
    made, views = build("horizontal.fedavg", params), drive(iter_of_nothing(), own).desks
    sent = {"weights": np.zeros(4)}
    tasks = [Task(TaskId("0" * 32, 0, 0, "reply", n), sent, (0, *n.encode())) for n in own]
    train = handler_of(made, "train").answer

    def alone(view: Any, task: Task) -> Any:
        try:
            return train(made, view, task)
        except AtollError as error:
            return error

    asked = batched(made, "train")
    assert asked is not None
    with np.errstate(all="ignore"):
        found, expected = asked(list(views.values()), tasks), list(map(alone, views.values(), tasks))
    assert [type(one) for one in found] == [type(one) for one in expected]
    errors = [one for one in found if isinstance(one, ProtocolError)]
    assert 0 < len(errors) < len(found) and {error.code for error in errors} == {"site.diverged"}


def test_a_state_is_changed_once_and_only_by_a_reply(drive: Any) -> None:
    """SCAFFOLD's control variates and FedPer's own weights stand in the sites' state."""
    params = {"target": "sick", "rounds": 2, "batch_size": 10, **MODELS["linear"]}
    made, own = build("horizontal.scaffold", params), tables()
    views = drive(iter_of_nothing(), own).desks
    tasks = [
        Task(TaskId("0" * 32, 0, 0, "reply", name), {"weights": np.zeros(4), "control": np.full(size, 0.1)}, (0,))
        for name, size in zip(own, (4, 5, 4, 4, 4, 4), strict=True)
    ]
    asked = batched(made, "train")
    assert asked is not None
    found = asked(list(views.values()), tasks)
    assert isinstance(found[1], ProtocolError) and found[1].code == "task.array" and not views["s1"].state
    assert all(set(views[name].state) == {"control"} for name in own if name != "s1")


def test_programs_whose_sites_take_no_steps() -> None:
    assert batched(build("statistics.describe", {}), "moments") is None
