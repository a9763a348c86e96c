"""What every registered program must keep, before its author writes any test of it.

A new program needs an entry in EXAMPLES; everything else is found by its registration.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import REGISTRY, Cohort, build, handler_of, summary
from atoll.contract.rounds import Checkpoint, Metrics, Round, Sum
from atoll.contract.wire import Message, canonical_json
from atoll.data.table import Table
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
}


def _model(family: str, target: str) -> dict[str, Any]:
    return {"kind": "linear", "family": family, "features": ["a", "b"], "target": target}


def _learner(family: str, target: str, **more: Any) -> dict[str, Any]:
    return {"family": family, "features": ["a", "b"], "target": target, **more}


def _trees(target: str, **more: Any) -> dict[str, Any]:
    return {"target": target, "features": ["a", "b"], "max_depth": 2, "max_bins": 4, **more}


MLP = {"kind": "mlp", "features": ["a", "b"], "hidden": [3]}
OTHER: dict[str, Any] = {"s1": {"kind": "linear", "family": "logistic", "features": ["a"]}}
WEIGHTS = {"weights": np.array([0.1, 0.5, -0.3])}
STUMP = {"kind": "trees", "features": ["a", "b"], "target": "value", "link": "identity", "num_trees": 1, "max_depth": 1}
STUMP_WEIGHTS = {"weights": np.array([0.5, 0, -0.5, 1, 3.0, 9, -1, 2.0, 0, 0, 4, -1, -1.5, 0, 0, 5])}
DAILY: dict[str, Any] = {
    "series": {"date": "b", "cases": "count", "population": "b", "population_of": "city"},
    "models": [
        {"days": 7, "model": {"kind": "linear", "family": "poisson", "features": ["a"], "target": "count"},
         "weights": [0.1, 0.5]}
    ],
    "day": "1970-09-28", "max_age_days": 60, "seir_days": 0,
}  # fmt: skip
EXAMPLES: list[tuple[str, dict[str, Any], dict[str, np.ndarray] | None]] = [
    ("statistics.comparison", {}, None),
    ("statistics.several", {"ask": [{"program": "statistics.describe"}, {"program": "statistics.quantiles"}]}, None),
    ("statistics.preparation", {"reasons": ["duplicate rows"]}, None),
    ("statistics.describe", {}, None),
    ("statistics.describe", {"columns": ["b"], "bins": 4, "tail_rows": 2}, None),
    ("statistics.quantiles", {"error": 1e-3, "bins": 16}, None),
    ("statistics.frequency", {"edges": {"a": [-1, 0, 0.5]}}, None),
    ("statistics.crosstab", {"pairs": [["binary", "binary"]]}, None),
    ("statistics.psi", {"columns": ["a", "binary"], "bins": 4}, None),
    ("statistics.correlation", {"columns": ["a", "b", "value"]}, None),
    ("statistics.correlation", {"method": "spearman", "missing": "listwise", "bins": 64}, None),
    ("statistics.vif", {"columns": ["a", "b", "value"]}, None),
    ("statistics.pca", {"components": 2}, None),
    ("statistics.group_by", {"by": ["binary"], "columns": ["a", "b"]}, None),
    ("statistics.anova", {"column": "value", "by": "binary"}, None),
    ("statistics.ttest", {"column": "value", "by": "binary"}, None),
    ("statistics.ttest", {"column": "a", "mean": 0.5}, None),
    ("statistics.woe", {"target": "binary"}, None),
    ("statistics.survival", {"duration": "count", "event": "binary"}, None),
    ("statistics.quality", {}, None),
    ("statistics.evaluation", {"model": _model("logistic", "binary")}, WEIGHTS),
    ("statistics.evaluation", {"model": _model("poisson", "count"), "own": False}, WEIGHTS),
    ("horizontal.glm", _learner("logistic", "binary"), None),
    ("horizontal.glm", _learner("linear", "value", l2=0.5), None),
    ("horizontal.glm", _learner("poisson", "count"), None),
    ("horizontal.fedavg", _learner("logistic", "binary", rounds=4, batch_size=16, checkpoint_every=2), None),
    ("horizontal.fedavg", _learner("poisson", "count", rounds=3, learning_rate=0.01), None),
    ("horizontal.fedavg", {"target": "value", "model": MLP, "rounds": 2, "clip": 0.1, "weighting": "sites"}, None),
    ("horizontal.fedbuff", _learner("logistic", "binary", rounds=3, buffer=4, checkpoint_every=1), None),
    ("horizontal.fedasync", _learner("logistic", "binary", rounds=6, checkpoint_every=2), None),
    ("horizontal.fedprox", _learner("logistic", "binary", rounds=2, proximal=0.5), None),
    ("horizontal.scaffold", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.fednova", _learner("logistic", "binary", rounds=2, local_epochs=2, momentum=0.5), None),
    ("horizontal.feddyn", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.moon", {"target": "binary", "model": MLP, "rounds": 2, "clip": 0.1, "checkpoint_every": 1}, None),
    ("horizontal.fedavgm", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.fedadam", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.fedyogi", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.fedadagrad", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.fedper", _learner("logistic", "binary", rounds=3, checkpoint_every=2), None),
    ("horizontal.fedrep", _learner("linear", "value", rounds=2, head_epochs=2), None),
    ("horizontal.fedbn", {"target": "binary", "model": {**MLP, "norm": "batch"}, "rounds": 2, "batch_size": 7}, None),
    ("horizontal.ditto", _learner("logistic", "binary", rounds=2, own_epochs=2), None),
    ("horizontal.perfedavg", _learner("logistic", "binary", rounds=2, variant="hessian-free"), None),
    ("horizontal.apfl", _learner("logistic", "binary", rounds=2, evaluate_every=1), None),
    ("horizontal.finetune", _learner("poisson", "count", rounds=2, learning_rate=0.01, tune_layers=["head"]), None),
    ("horizontal.ifca", _learner("logistic", "binary", rounds=3, clusters=3, checkpoint_every=2), None),
    ("horizontal.feddf", _learner("logistic", "binary", rounds=2, generated=20), None),
    ("horizontal.fedmd", {"target": "binary", "model": MLP, "rounds": 2, "generated": 20, "models": OTHER}, None),
    ("horizontal.cyclic", _learner("logistic", "binary", rounds=2, checkpoint_every=1), None),
    ("horizontal.online", _learner("logistic", "binary", rounds=4, time="b", start=0, every=200), None),
    ("horizontal.weighted", _learner("logistic", "binary", rounds=3, checkpoint_every=2, alone=True), None),
    ("horizontal.weighted", _learner("linear", "value", rounds=2, volume=0.5, learning_rate=0.01), None),
    ("horizontal.shapley", _learner("logistic", "binary", rounds=2, checkpoint_every=1, method="exact"), None),
    ("horizontal.shapley", _learner("linear", "value", rounds=2, within=0.0, passes=3), None),
    ("horizontal.gossip", _learner("logistic", "binary", rounds=3, report_every=2, checkpoint_every=2), None),
    ("trees.edges", {"columns": ["a", "b", "count"], "max_bins": 4}, None),
    ("trees.boosted", _trees("binary", trees=2, checkpoint_every=1), None),
    ("trees.boosted", _trees("value", trees=3, splits="random", checkpoint_every=2, binning="even"), None),
    ("trees.boosted", _trees("value", trees=2, objective={"kind": "quantile", "alpha": 0.8}, min_rows=5), None),
    ("trees.boosted", _trees("count", trees=2, objective={"kind": "cox", "event": "binary"}, min_rows=5), None),
    ("trees.forest", _trees("binary", trees=3, batch=2, bootstrap=False), None),
    ("trees.isolation", {"features": ["a", "b"], "trees": 3, "max_depth": 3, "contamination": 0.1}, None),
    ("trees.isolation", {"features": ["a", "b"], "trees": 2, "max_depth": 2, "target": "binary"}, None),
    ("trees.bagged", _trees("value", trees=8), None),
    ("trees.explanation", {"model": STUMP, "dependence": True, "bins": 3}, STUMP_WEIGHTS),
    ("epidemic.daily", DAILY, None),
    ("horizontal.dpsgd", _learner("logistic", "binary", rounds=3, expected_rows=150, sampling_rate=1.0), None),
    ("horizontal.dpftrl", _learner("logistic", "binary", rounds=3, expected_rows=150, time="b"), None),
]
MAILED = {"horizontal.gossip"}
"""Whose sites write to each other, which no noise covers."""
INSTALLED = sorted(name for name, cls in REGISTRY.items() if cls.__module__.startswith("atoll."))
STUDIES = [(name, params) for name, params, start in EXAMPLES if start is None]
"""Programs that score a given model run only inside a study: the learners', whose models they score."""
every_program = pytest.mark.parametrize("name", INSTALLED)


def tables_of(table: Callable[..., Table], seed: int = 3) -> dict[str, Table]:
    random = np.random.default_rng(seed)
    tables = {}
    for i, n in enumerate((40, 15, 70, 33)):
        a, b = random.normal(i / 2 - 1, 1, n).clip(-5, 5), random.uniform(0, 300 + 200 * i, n)
        eta = 0.4 * a + b / 1000
        tables[f"s{i}"] = table(
            {
                "a": a,
                "b": b,
                "binary": (random.random(n) < 1 / (1 + np.exp(-eta))).astype(float),
                "count": np.minimum(random.poisson(np.exp(eta)), 40).astype(float),
                "value": eta * 10 + random.normal(0, 1, n),
            },
            COLUMNS,
        )
    return tables


def halves(tables: Mapping[str, Table]) -> tuple[dict[str, Table], dict[str, Table]]:
    """(training, held-out) rows of every site."""
    odd = {name: np.arange(len(table)) % 2 == 1 for name, table in tables.items()}
    return {n: t.rows(~odd[n]) for n, t in tables.items()}, {n: t.rows(odd[n]) for n, t in tables.items()}


@dataclass(frozen=True)
class Example:
    """A program with parameters, and what its two halves come to on everybody's tables."""

    name: str
    params: dict[str, Any]
    start: Any
    training: dict[str, Table]
    holdouts: dict[str, Table]
    driven: Any


@pytest.fixture(scope="module", params=EXAMPLES, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(EXAMPLES)])
def example(request: pytest.FixtureRequest, federations: Any, drive: Any) -> Example:
    """Each of EXAMPLES in turn, driven once for all tests."""
    name, params, start = request.param
    training, holdouts = halves(tables_of(federations.table))
    driven = drive(steps_of(name, params, training, start), training, holdouts)
    return Example(name, params, start, training, holdouts, driven)


@dataclass(frozen=True)
class Study:
    """A program with parameters as a study of everybody, and what comes of it when nothing is hidden, and everybody's
    replies arrive in the cohort's order."""

    name: str
    params: dict[str, Any]
    tables: dict[str, Table]
    plan: Any
    outcome: dict[str, Any]
    releases: list[dict[str, Any]]


def delayed(order: list[str]) -> Callable[[str, Endpoint], Endpoint]:
    """Endpoints whose replies arrive in *order*."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def wait(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            time.sleep(0.004 * order.index(name))
            return reply

        return wait

    return wrap


RUN = {"holdout": 0.4, "seed": 5}


@pytest.fixture(scope="module", params=STUDIES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(STUDIES)])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, federations: Any) -> Study:
    """Each of STUDIES in turn, run once for all tests."""
    name, params = request.param
    federation = federations(tmp_path_factory.mktemp("plain"))
    tables = tables_of(federation.table)
    plan = federation.plan(name, params, tables, run=RUN)
    try:
        outcome = federation.run(plan, tables, wrap=delayed([*tables]))
        return Study(name, params, tables, plan, outcome, federation.releases())
    finally:
        federation.close()


def steps_of(name: str, params: Mapping[str, Any], tables: Mapping[str, Table], start: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build(name, params).coordinate(Cohort(tuple(tables), schema, seed=7), start)


def fingerprint(value: Any) -> Any:
    """Any result as something that is equal only bit by bit (NaN equals NaN)."""
    if hasattr(value, "spec"):
        return [value.spec(), fingerprint(value.weights)]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    if isinstance(value, float | np.floating):
        return float(value).hex()
    if isinstance(value, Mapping):
        return {key: fingerprint(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(inner) for inner in value]
    return value


def asked(item: Round) -> Any:
    """A round as what a site would get."""
    fields = {name: declared.to_json() for name, declared in item.reply.items()}
    sends = fingerprint({name: np.asarray(value) for name, value in item.send.items()})
    each = {site: fingerprint(dict(extra)) for site, extra in item.send_to.items()}
    told = [item.name, item.reduce.tag, fields, item.sites, item.optional, item.program]
    return [*told, canonical_json(dict(item.params)), sends, each]


# ---------------------------------------------------------------- declared, and kept


@every_program
def test_has_an_example_here(name: str) -> None:
    assert name in {example for example, _, _ in EXAMPLES}, f"add an entry for {name} to EXAMPLES"


@every_program
def test_its_module_says_what_a_protocol_must_say(name: str) -> None:
    text = re.sub(r"\s+", " ", sys.modules[REGISTRY[name].__module__].__doc__ or "").lower()
    for part in ("parties:", "messages:", "coordinator learns", "dropout:", "cost:"):
        assert part in text, f"{name}: its module's docstring does not say '{part}'"
    assert summary(REGISTRY[name]).endswith(".")


@every_program
def test_its_parameters_are_frozen_and_documented(name: str) -> None:
    params = REGISTRY[name].Params
    assert params.model_config["extra"] == "forbid"
    assert params.model_config["frozen"] is True


@pytest.mark.parametrize(("name", "params", "start"), EXAMPLES)
def test_unknown_parameters_are_refused(name: str, params: dict[str, Any], start: Any) -> None:
    with pytest.raises(PlanError) as caught:
        build(name, {**params, "no_such_parameter": 1})
    assert (caught.value.code, caught.value.field) == ("plan.unknown-key", "no_such_parameter")


def test_its_rounds_are_what_it_declares(example: Example) -> None:
    """Reductions it said it needs; bounds and steps it said it offers; handlers that are there."""
    name, driven = example.name, example.driven
    assert driven.rounds
    assert driven.result is not None
    for item in driven.rounds:
        program = build(item.program, item.params)
        handler = handler_of(program, item.name)
        assert handler.reduce == item.reduce.tag
        assert handler.groups <= set(item.reply)
        assert item.optional or item.reduce.tag in program.capabilities.needs
        if isinstance(item.reduce, Sum):
            for field_name, declared in item.reply.items():
                if "bounded" in program.capabilities.offers:
                    assert declared.bound is not None, f"{name}/{item.name}: {field_name} has no bound"
                    assert np.isfinite(declared.bound)
                if "resolution" in program.capabilities.offers:
                    assert declared.step is not None, f"{name}/{item.name}: {field_name} has no step"
                    assert declared.step > 0


# ---------------------------------------------------------------- sans-IO


def test_its_coordinator_half_is_a_pure_generator(example: Example) -> None:
    """Sent the same reductions again, it asks the same rounds and comes to the same result: so resume is replay."""
    first, value, rounds, told = example.driven, None, [], 0
    steps = steps_of(example.name, example.params, example.training, example.start)
    reductions = iter(first.reduced)
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            result = stop.value
            break
        value = None
        if isinstance(item, Round):
            rounds.append(item)
            value = next(reductions)
        else:
            assert isinstance(item, Metrics | Checkpoint)
            told += 1
    assert [asked(item) for item in rounds] == [asked(item) for item in first.rounds]
    assert fingerprint(result) == fingerprint(first.result)
    assert told == len(first.metrics) + len(first.checkpoints)


def test_it_can_go_on_from_each_of_its_checkpoints(example: Example, drive: Any) -> None:
    whole, training = example.driven, example.training
    for (number, checkpoint), kept, flying in zip(whole.checkpoints, whole.kept, whole.flying, strict=True):
        steps = steps_of(example.name, example.params, training, dict(checkpoint.state))
        resumed = drive(steps, training, example.holdouts, first_round=number, kept=kept, flying=flying)
        again, before = ([asked(item) for item in rounds] for rounds in (resumed.rounds, whole.rounds[number:]))
        if example.name in MAILED:  # a letter that is sealed anew is sealed differently
            again, before = ([told[:-1] for told in rounds] for rounds in (again, before))
        assert again == before
        assert fingerprint(resumed.result) == fingerprint(whole.result)


def test_its_rounds_are_asked_within_one_bound_or_two(example: Example) -> None:
    """Sites refuse others in a run: sums of shares that are cut to many bounds would tell each share."""
    known: dict[bytes, list[Any]] = {}
    schema = next(iter(example.training.values())).schema
    for one in (one for one in example.driven.rounds if isinstance(one.reduce, Sum)):
        made, sent = build(one.program, one.params), {name: np.asarray(value) for name, value in one.send.items()}
        own = made.asks(one.name, schema, sent) if hasattr(made, "asks") else None
        assert own in (None, one.reply)
        if own is None and not getattr(made, "narrows", False):
            before = known.setdefault(canonical_json([one.program, one.params, one.name]), [])
            told = {name: (field.dtype, field.bound, field.step) for name, field in one.reply.items()}
            before += [] if told in before else [told]
    assert all(len(told) <= 2 for told in known.values())


def test_the_order_of_arrival_does_not_change_a_bit(federation: Any, study: Study) -> None:
    if "stream" in build(study.name, study.params).capabilities.needs:
        pytest.skip("what comes first is used first")
    outcome = federation.run(study.plan, study.tables, wrap=delayed([*study.tables][::-1]))
    assert fingerprint(outcome) == fingerprint(study.outcome)


def test_nothing_is_clipped_on_data_that_keeps_the_schema(study: Study) -> None:
    assert study.releases
    assert all(body["clipped"] == 0 for body in study.releases)


# ---------------------------------------------------------------- under every protection


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Equal, numbers to within *tolerance* of each other's size."""
    if hasattr(one, "spec"):
        return close(one.weights.tolist(), other.weights.tolist(), tolerance)
    if isinstance(one, np.ndarray):
        return close(one.tolist(), other.tolist(), tolerance)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float | np.floating) and other is not None:
        return bool(np.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool(one == other)


def refused(federation: Any, plan: Any, tables: Mapping[str, Table]) -> None:
    """A program whose rounds show single replies does not run where only sums may be seen."""
    with pytest.raises(PlanError) as caught:
        federation.run(plan, tables)
    codes = {caught.value.code, *[part.code for part in caught.value.parts]}
    assert codes & {"plan.illegal-combination", "plan.active-choice", "privacy.exact-replies", "privacy.rounds"}
    assert not federation.releases()


HOMOMORPHIC = [{"sum": "paillier", "key_bits": 2048}, {"sum": "ckks"}]
PROTECTIONS_BESIDES_PLAIN = [
    pytest.param({"sum": "secagg"}, id="secagg"),
    pytest.param({"sum": "secagg", "adversary": "active"}, id="active", marks=pytest.mark.slow),
    *[pytest.param(choice, id=choice["sum"], marks=pytest.mark.slow) for choice in HOMOMORPHIC],
]
STATED = {"secagg": 1e-6, "paillier": 1e-6, "ckks": 1e-3}
"""What the fixed point (or CKKS) may move a result by, relative to its size."""


@pytest.mark.parametrize("protection", PROTECTIONS_BESIDES_PLAIN)
def test_it_gives_the_same_under_every_protection(federation: Any, study: Study, protection: dict[str, Any]) -> None:
    hiding = federation.plan(study.name, study.params, study.tables, run=RUN, protection=protection)
    made = build(study.name, study.params)
    needs = made.capabilities.needs
    own = any(getattr(made, name, False) for name in ("self_chosen", "remembers", "personal"))
    if not needs & {"sum"} or needs & {"gather"} or ((own or "ready" in needs) and "adversary" in protection):
        refused(federation, hiding, study.tables)
        return
    hidden = federation.run(hiding, study.tables)
    tolerance = STATED[protection["sum"]]
    assert close(study.outcome["result"], hidden["result"], tolerance)
    assert close(study.outcome["evaluation"], hidden["evaluation"], tolerance)


@pytest.mark.parametrize(
    "protection", [pytest.param({"sum": "plain"}, id="plain", marks=pytest.mark.slow), *PROTECTIONS_BESIDES_PLAIN]
)
@pytest.mark.parametrize(("name", "params"), STUDIES)
def test_it_runs_with_noise_under_every_protection(
    federation: Any, name: str, params: dict[str, Any], protection: dict[str, Any]
) -> None:
    tables = tables_of(federation.table)
    made = build(name, params)
    parts = [part for part in (made, *made.parts) if part.name != "statistics.several"]
    bounded = all(h.record for part in parts for h in part.handlers.values() if h.reduce == "sum")  # type: ignore[attr-defined]
    privacy = {"unit": "record" if bounded else "site", "epsilon": 20.0, "delta": 1e-5}
    cohort = {"min_sites": len(tables)}
    plan = federation.plan(name, params, tables, run=RUN, protection=protection, privacy=privacy, cohort=cohort)
    if name in MAILED or made.capabilities.needs & {"gather", "stream"}:
        refused(federation, plan, tables)
        return
    outcome = federation.run(plan, tables)
    assert outcome["result"] is not None
    charged = [body["epsilon"] for body in federation.releases() if body["step"] == "reply" and body["fields"]]
    assert charged
    assert all(0 < epsilon <= 20 for epsilon in charged)
