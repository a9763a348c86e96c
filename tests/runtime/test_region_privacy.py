"""Differential privacy over regions: every region's sum holds all of the noise, whatever its operator says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Message
from atoll.runtime.budget import Budget
from atoll.runtime.noise import noise_of
from atoll.runtime.policy import Policy
from atoll.runtime.region import Level
from atoll.transport.base import Progress

from .test_region import LEARN, Nation, Tree, leaves, lost, small

SIZE = 2000
BASE = 1000
EMPTY = frozenset("abc")
"""Sites that count nobody, so that noise drives what they tell below zero."""
PROMISE = {"unit": "record", "epsilon": 1.0, "delta": 1e-6}


@program("test.region.noise", needs={"sum"}, offers={"bounded", "resolution"})
class Known:
    """Sums that are known, so that what was added to them shows."""

    class Params(ProgramParams):
        rounds: int = 1

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        seen = []
        for _ in range(self.params.rounds):
            fields = {"n": count((SIZE,), bound=10**6), "x": real(SIZE, bound=1.0, step=2.0**-20)}
            seen.append((yield Round("known", Sum(), fields)))
        return {"seen": seen}

    def fewest(self, num_sites: int) -> int:
        return 1

    def _moved(self, schema: Any, sent: Any) -> dict[str, Norms]:
        return {"n": touches(1), "x": Norms(1.0, 1.0)}

    @handler("known", record=_moved, site=_moved)
    def known(self, site: SiteView, task: Task) -> Reply:
        return {"n": np.full(SIZE, 0 if site.name in EMPTY else BASE), "x": np.zeros(SIZE)}


@pytest.fixture
def nation(tmp_path: Path) -> Iterator[Callable[..., Nation]]:
    """Builds nations, and gives back what they hold."""
    made: list[Nation] = []

    def build(tree: Tree, levels: Mapping[str, Level], **more: Any) -> Nation:
        made.append(Nation(tmp_path / str(len(made)), levels, **more))
        return made[-1].build(tree)

    yield build
    for one in made:
        one.close()


def level(protection: str, least: int, members: int = 1, **cohort: Any) -> Level:
    rule = {"min_sites": least, "members": members, **cohort}
    return Level.model_validate({"protection": protection, "cohort": rule})


def known(federation: Any, tree: Tree, protection: str = "plain", privacy: Any = None, **params: Any) -> Any:
    return federation.plan(
        "test.region.noise", params, leaves(tree), protection=protection, cohort={"min_sites": 1, "members": 6},
        run={"min_group_size": 1, "deadline_s": 20}, privacy={**PROMISE, **(privacy or {})},
    )  # fmt: skip


def check_noise(made: Nation, told: Mapping[str, Any], times: float, counted: int) -> None:
    """What was added to a sum is *times* the variance that the plan promises, and even; of a message, where reals are
    packed, as far as it is counts."""
    noise = noise_of(made.plan, 2)
    assert noise is not None
    sigma = noise.multipliers[0] * math.sqrt(2)  # two fields share what is spent
    for added in (told["n"] - counted, told["x"]):
        if added.dtype == np.uint8:
            continue
        assert np.var(added) / sigma**2 == pytest.approx(times, rel=0.16)  # five standard errors
        assert abs(np.mean(added)) < 5 * sigma * math.sqrt(times / SIZE)


def two_provinces(federation: Any) -> Tree:
    north = {"harbour": small(federation, a=1, b=2, c=7), "hill": small(federation, d=3, e=4)}
    return {"north": north, "south": small(federation, f=5, g=6), "h": small(federation, h=8)["h"]}


LEVELS = {"north": level("plain", 1, 3), "harbour": level("secagg", 2), "hill": level("secagg", 2),
          "south": level("plain", 2)}  # fmt: skip
HARBOUR, HILL, SOUTH, ALONE = 3 / 2, 2 / 2, 2.0, 1.0
"""Times the promised variance: of three shares of which two are enough; of two; of two sites that each add all; and
of one that has regions beside it."""


def releases(told: dict[str, list[Any]], *names: str) -> Any:
    """Keeps what sites of these *names* let out."""

    def wrap(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            if name in names and reply.kind == "release":
                told.setdefault(name, []).append(reply)
            return reply

        return answer

    return wrap


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_every_regions_sum_holds_all_of_the_noise(federation: Any, nation: Any, protection: str) -> None:
    tree, told = two_provinces(federation), dict[str, list[Any]]()
    made = nation(tree, LEVELS, wrap=releases(told, "harbour", "hill", "h"))
    [total] = made.run(known(federation, tree, protection))["result"]["seen"]
    assert total.members == 8
    check_noise(made, total, HARBOUR + HILL + SOUTH + ALONE, 5 * BASE)
    for name, times, counted in (("harbour", HARBOUR, 0), ("hill", HILL, 2 * BASE)):
        check_noise(made, told[name][0].arrays, times, counted)  # north, above it, asks plainly
    if protection == "plain":
        check_noise(made, told["h"][0].arrays, ALONE, BASE)
    for name in [*leaves(tree), "north", "harbour"]:
        spent = made.journals[name].spent("default", Budget())
        assert 0.99 < spent.epsilon <= 1 and spent.exact == 0, "sites are charged, and so is what a region lets out"
    made.settle()
    made.check_ledgers()


def test_a_region_that_says_it_has_more_sites_gets_no_less_noise(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, d=3, e=4)}
    made = nation(tree, {name: level("secagg", 2) for name in tree})
    west = made.regions["west"]
    works, joins = west._work, west._members
    west._members = lambda run, progress: joins(run, progress) + 4

    def boasts(*args: Any) -> Any:
        done = works(*args)
        return replace(done, asked=replace(done.asked, members=6))

    west._work = boasts
    [total] = made.run(known(federation, tree))["result"]["seen"]
    assert total.members == 8
    check_noise(made, total, 2.0, 2 * BASE)


def test_without_a_region_the_others_noise_is_there(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, d=3, e=4), "mid": small(federation, f=5)}
    made = nation(tree, {"west": level("secagg", 2), "east": level("secagg", 2), "mid": level("plain", 1)},
                  wrap=lost({"a", "mid"}, 1))  # fmt: skip
    before, after = made.run(known(federation, tree, rounds=2))["result"]["seen"]
    assert (before.members, after.sites) == (5, ("east",))
    noise = noise_of(made.plan, 3)
    assert noise is not None and noise.costs[0] < noise.costs[1]
    check_noise(made, before, 3.0, 3 * BASE)
    check_noise(made, after, 1.0, 2 * BASE)
    made.settle()
    assert "region.lost" in made.stores["nation"].run(made.run_id)["note"]
    spent = {name: made.journals[name].spent("default", Budget()).epsilon for name in ("west", "b", "east", "d")}
    assert made.journals["west"].status(made.run_id) == "finished", "sites that were lost tell nothing of the data"
    assert spent["west"] == pytest.approx(noise.costs[0]) and spent["east"] == spent["d"] == pytest.approx(1, rel=0.01)
    made.check_ledgers()


@pytest.mark.parametrize(
    ("privacy", "policies", "code", "site"),
    [
        ({"colluding": 2}, {}, "dp.no-honest-site", "west"),
        ({"mechanism": "gaussian"}, {}, "dp.gaussian-shares", "west"),
        ({}, {"d": {"budgets": {"*": Budget(epsilon=0.5)}}}, "budget.spent", "east"),
        ({}, {"east": {"budgets": {"*": Budget(unit="site")}}}, "budget.unit", "east"),
    ],
)
def test_what_a_region_cannot_promise_its_sites_is_refused(
    federation: Any, nation: Any, privacy: Any, policies: Any, code: str, site: str
) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, d=3, e=4, f=5)}
    told: dict[str, list[Any]] = {}
    made = nation(
        tree, {"west": level("secagg", 2), "east": level("plain", 3)}, wrap=releases(told, *leaves(tree)),
        policies={name: Policy.sandbox().model_copy(update=rule) for name, rule in policies.items()},
    )  # fmt: skip
    with pytest.raises(AtollError) as caught:
        made.run(known(federation, tree, privacy=privacy))
    parts = caught.value.parts or [caught.value]
    assert code in {part.code for part in parts} and {part.where["site"] for part in parts} == {site}
    assert not told


STUDIES = {
    "horizontal.dpsgd": ({**LEARN, "rounds": 2, "sampling_rate": 0.3, "expected_rows": 120}, {}),
    "horizontal.dpftrl": ({**LEARN, "features": ["dose"], "rounds": 3, "expected_rows": 120, "time": "age"}, {}),
    "horizontal.fedavg": ({**LEARN, "rounds": 2, "batch_size": 16}, {"unit": "site", "epsilon": 8.0}),
    "statistics.describe": ({"columns": ["age", "dose"]}, {"epsilon": 3.0}),
}
SMALL = "horizontal.dpsgd"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == SMALL else pytest.mark.slow) for name in STUDIES]
)
def test_programs_run_under_noise_over_regions(federation: Any, nation: Any, name: str) -> None:
    tree = {"north": {"harbour": small(federation, a=1, b=2), "hill": small(federation, d=3, e=4)},
            "south": small(federation, f=5, g=6)}  # fmt: skip
    levels = {"north": level("secagg", 2, 2), "harbour": level("secagg", 2, on_dropout="fail"),
              "hill": level("plain", 1), "south": level("secagg", 2, on_dropout="fail")}  # fmt: skip
    params, privacy = STUDIES[name]
    plan = federation.plan(
        name, params, leaves(tree), protection="secagg", cohort={"min_sites": 1, "members": 4},
        run={"min_group_size": 1, "holdout": 0.2 if name == "horizontal.dpsgd" else 0.0},
        privacy={**PROMISE, **privacy},
    )  # fmt: skip
    made = nation(tree, levels)
    found = made.run(plan)["result"]
    if "model" in found:
        assert np.isfinite(found["model"].weights).all() and np.abs(found["model"].weights).sum() > 0
    made.settle()
    told = made.stores["nation"].result(made.run_id)[0]["privacy"]
    assert told["noised"] and told["spent"] <= plan.privacy.epsilon
    for site in leaves(tree):
        assert made.journals[site].spent("default", Budget()).epsilon == pytest.approx(told["spent"])
    made.check_ledgers()
