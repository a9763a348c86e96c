"""Regions in one process: sums of sums are the sums of one flat cohort, at any depth and under any protection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Cells
from atoll.contract.errors import AtollError, PlanError, PolicyError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Sum, Summed, Task, count, real
from atoll.contract.wire import Message
from atoll.crypto.identity import Identity, verify
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.ledger.verify import verify_file, verify_together
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.region import Level, Region, RegionConfig, RegionHome, told_of
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.runtime.study import check_plan, settled
from atoll.transport.base import Progress
from atoll.transport.local import LocalTransport

Wrap = Callable[[str, Callable[[Message, Progress], Message]], Callable[[Message, Progress], Message]]
Tree = Mapping[str, "Tree | Table"]
FEATURES = ("age", "dose")
COLUMNS = {
    "age": {"dtype": "real", "range": [0, 100]},
    "dose": {"dtype": "real", "range": [-5, 5]},
    "cured": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
LEARN = {"family": "logistic", "target": "cured", "features": list(FEATURES)}


@dataclass
class Nation:
    """A tree of regions over sites, each party with its own store, journal, ledger and, below the top, loop."""

    folder: Path
    levels: Mapping[str, Level]
    policies: Mapping[str, Policy] = field(default_factory=dict)
    wrap: Wrap = lambda _, endpoint: endpoint
    durable: bool = False

    def __post_init__(self) -> None:
        self.stores: dict[str, RunStore] = {}
        self.journals: dict[str, Journal] = {}
        self.transports: list[LocalTransport] = []
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.threads: list[threading.Thread] = []
        self.regions: dict[str, Region] = {}
        self.made: dict[str, tuple[Identity, Policy, bytes]] = {}
        self.below: dict[str, tuple[str, ...]] = {}
        self.keys: dict[str, tuple[bytes, Any]] = {}

    def build(self, tree: Tree) -> Nation:
        """Coordinators from the top to the sites."""
        self.top, self.key = self._coordinator("nation", tree)
        return self

    def _coordinator(self, name: str, tree: Tree) -> tuple[Coordinator, bytes]:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        identity = Identity.generate("coordinator")
        self.keys[name] = identity.public, identity.sign
        store = self.stores[name] = RunStore(f"sqlite:///{folder / 'store.db'}", durable=self.durable)
        endpoints = {}
        for site, part in tree.items():
            own = Identity.generate(site)
            journal = Journal(folder / f"{site}.db", site, own.public, own.sign, durable=self.durable)
            self.journals[site] = journal
            store.invite(site, "a" * 64, 2**31 - 1)
            store.enrol(site, "a" * 64, own.public.hex(), "")
            endpoints[site] = self.wrap(site, self._site(own, journal, part, identity.public).handle)
        transport = LocalTransport(endpoints, threads=len(endpoints))
        self.transports.append(transport)
        self.below[name] = tuple(tree)
        return Coordinator(transport, store, store.ledger(identity.public, identity.sign)), identity.public

    def _site(self, own: Identity, journal: Journal, part: Tree | Table, key: bytes) -> Site:
        policy = self.policies.get(own.name, Policy.sandbox())
        if isinstance(part, Table):
            return Site(own, journal, policy, lambda plan: SiteData.of(part, plan, own.name), key)
        below, _ = self._coordinator(own.name, part)
        self.regions[own.name] = Region(own, journal, policy, key, self.levels[own.name], below, self._loop())
        self.made[own.name] = own, policy, key
        return self.regions[own.name]

    def restart(self, name: str) -> None:
        """A region's process again, with nothing but what its files hold."""
        own, policy, key = self.made[name]
        old, transport = self.journals[name], self.regions[name]._below.coordinator.transport
        self.stores[name].close()
        old.close()
        path = Path(old._path)
        self.journals[name] = Journal(path, name, own.public, own.sign, durable=self.durable)
        self.stores[name] = store = RunStore(f"sqlite:///{self.folder / name / 'store.db'}", durable=self.durable)
        below = Coordinator(transport, store, store.ledger(*self.keys[name]))
        region = Region(own, self.journals[name], policy, key, self.levels[name], below, self._loop())
        self.regions[name] = region
        region.tidy()

    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self.threads.append(threading.Thread(target=loop.run_forever, daemon=True))
        self.threads[-1].start()
        self.loops.append(loop)
        return loop

    def run(self, plan: Plan) -> dict[str, Any]:
        """A plan over the top's own sites; returns the outcome."""
        self.plan = settled(plan)
        self.run_id = self.stores["nation"].create_run(self.plan, self.below["nation"])
        return asyncio.run(self.top.run(self.run_id))

    def check_ledgers(self) -> None:
        """At every level the ledgers hold together."""
        for name, store in self.stores.items():
            files = [self.folder / f"{name}.coordinator.jsonl"]
            store.export_ledger(files[0])
            for site in self.below[name]:
                files.append(self.folder / f"{site}.jsonl")
                self.journals[site].export(files[-1])
            verify_together([verify_file(path, verify) for path in files], verify)

    def settle(self) -> None:
        """Wait until the loops below have done what was left to do; one level's end is told to the next."""

        async def idle() -> None:
            while len(tasks := asyncio.all_tasks()) > 1:
                await asyncio.wait(tasks - {asyncio.current_task()})  # type: ignore[arg-type]

        for loop in self.loops * len(self.regions):
            asyncio.run_coroutine_threadsafe(idle(), loop).result(30)

    def close(self) -> None:
        self.settle()
        for transport in self.transports:
            transport.close()
        for loop, thread in zip(self.loops, self.threads, strict=True):
            asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            loop.close()
        for store in self.stores.values():
            store.close()
        for journal in self.journals.values():
            journal.close()


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


def table(federation: Any, seed: int, rows: int = 60) -> Table:
    random = np.random.default_rng(seed)
    age, dose = random.uniform(20, 90, rows), random.normal(0, 1.5, rows).clip(-5, 5)
    odds = 0.05 * (age - 55) + 0.8 * dose + 0.1 * seed
    data = {"age": age, "dose": dose, "cured": (random.random(rows) < 1 / (1 + np.exp(-odds))).astype(int)}
    return federation.table(data, COLUMNS, max_rows=1000)


def leaves(tree: Tree) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for name, part in tree.items():
        found |= {name: part} if isinstance(part, Table) else leaves(part)
    return found


def three_levels(federation: Any) -> Tree:
    """nation → 2 provinces → 2 cities each → 2 or 3 sites."""
    cities: dict[str, dict[str, Tree]] = {"north": {}, "south": {}}
    for place, (province, size) in enumerate([("north", 2), ("north", 3), ("south", 2), ("south", 2)]):
        sites = {f"site-{place}-{i}": table(federation, 10 * place + i, 50 + 7 * i + place) for i in range(size)}
        cities[province][f"city-{place}"] = sites
    return cities


def levels_of(tree: Tree, protection: Callable[[int, str], str], members: int = 8, depth: int = 1) -> dict[str, Level]:
    """A level for every region of *tree*."""
    found = {}
    for name, part in tree.items():
        if not isinstance(part, Table):
            cohort = {"min_sites": 2, "members": members}
            found[name] = Level.model_validate({"protection": protection(depth, name), "cohort": cohort})
            found |= levels_of(part, protection, members, depth + 1)
    return found


def same(found: Any, expected: Any, **tolerance: float) -> None:
    """Two results, number by number."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key != "dense":  # bytes to and from the top, not to and from all
                same(found[key], value, **tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, **tolerance)
    elif isinstance(expected, float | np.ndarray):
        np.testing.assert_allclose(found, expected, **tolerance)
    elif hasattr(expected, "weights"):
        np.testing.assert_allclose(found.weights, expected.weights, **tolerance)
    else:
        assert found == expected


STUDIES = {
    "horizontal.fedavg": {**LEARN, "rounds": 3, "batch_size": 16},
    "horizontal.scaffold": {**LEARN, "rounds": 3, "batch_size": 16},
    "horizontal.glm": LEARN,
    "statistics.describe": {"columns": list(FEATURES)},
}
MIXED = {1: "secagg", 2: "plain"}


@pytest.mark.parametrize("program", STUDIES)
@pytest.mark.parametrize("kind", ["plain", pytest.param("secagg", marks=pytest.mark.slow), "mixed"])
def test_three_levels_give_what_one_flat_cohort_gives(federation: Any, nation: Any, program: str, kind: str) -> None:
    tree = three_levels(federation)
    run = (
        {"seed": 3, "holdout": 0.2, "min_group_size": 1} if program != "statistics.describe" else {"min_group_size": 1}
    )
    flat = federation.plan(
        program, STUDIES[program], leaves(tree), protection="plain" if kind == "plain" else "secagg", run=run
    )
    expected = federation.run(flat, leaves(tree))
    top = "plain" if kind == "plain" else "secagg"
    made = nation(tree, levels_of(tree, lambda depth, _: MIXED[depth] if kind == "mixed" else top))
    plan = federation.plan(
        program, STUDIES[program], leaves(tree), protection=top, run=run, cohort={"min_sites": 2, "members": 8}
    )
    found = made.run(plan)
    close = {"rtol": 1e-9, "atol": 1e-12} if kind == "plain" else {"rtol": 2e-4, "atol": 2e-5}
    same(found["result"], expected["result"], **close)
    if found["evaluation"]:
        same(found["evaluation"]["pooled"], expected["evaluation"]["pooled"], **close)
        assert found["evaluation"]["own"] == {}
    made.settle()
    made.check_ledgers()


# ---------------------------------------------------------------- sums of sums


ASKED: list[tuple[str, int]] = []
"""Every handler call: (site, round)."""
BOUND = 8.0


@program("test.region.sums", needs={"sum"}, offers={"bounded", "resolution"})
class Sums:
    """A few rounds of sums, each depending on the one before."""

    class Params(ProgramParams):
        rounds: int = 2
        groups: bool = False

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        value, seen = 1.0, []
        for _ in range(self.params.rounds):
            fields = {"x": real(2, bound=BOUND, step=2.0**-30), "n": count(bound=1000), "sites": count(bound=1)}
            name = "groups" if self.params.groups else "plainly"
            total = yield Round(name, Sum(), fields, {"value": value})
            value = float(total["x"][0]) / 64
            sites = int(total["sites"])
            seen.append({"x": total["x"], "n": int(total["n"]), "sites": sites, "who": total.sites})
            if cohort.sites != ("check",) and total.members != sites:
                raise ProtocolError("test.members", f"{total.members} sites are told, and {sites} answered")
        return {"seen": seen}

    def fewest(self, num_sites: int) -> int:
        return 1

    @handler("plainly")
    def plainly(self, site: SiteView, task: Task) -> Reply:
        ASKED.append((site.name, task.id.round))
        x = float(task.take("value", ())) * site.table["dose"].sum()
        return {
            "x": [np.round(x * 2.0**20) / 2.0**20, 1e9 if site.name == "loud" else BOUND],
            "n": len(site.table),
            "sites": 1,
        }

    @handler("groups", groups=("n",))
    def groups(self, site: SiteView, task: Task) -> Reply:
        return self.plainly(site, task)


@program("test.region.gather", needs={"gather"})
class Gathering:
    """Asks for single replies."""

    class Params(ProgramParams):
        pass

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        yield Round("own", Gather(), {"n": count(bound=1000)})
        return {}

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        return {"n": len(site.table)}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ASKED.clear()
    yield
    ASKED.clear()


def sums(federation: Any, tree: Tree, protection: str = "plain", **more: Any) -> Plan:
    cohort = {"min_sites": 1, "members": 1000, **more.pop("cohort", {})}
    made = {"min_group_size": 1, "deadline_s": 20, **more.pop("run", {})}
    params = more.pop("params", {})
    return federation.plan(
        "test.region.sums", params, leaves(tree), protection=protection, cohort=cohort, run=made, **more
    )


def level(protection: str = "plain", **cohort: Any) -> Level:
    return Level.model_validate({"protection": protection, "cohort": {"min_sites": 1, "members": 1000, **cohort}})


PROTECTIONS = st.sampled_from(["plain", "secagg"])
SHAPES = st.recursive(st.none(), lambda part: st.lists(part, min_size=2, max_size=3), max_leaves=6).filter(bool)


@settings(max_examples=8)
@given(SHAPES, st.data())
def test_sums_over_any_tree_are_those_over_its_sites(
    federation: Any, tmp_path_factory: Any, shape: Any, data: Any
) -> None:
    levels: dict[str, Level] = {}

    def grown(part: Any, name: str) -> Tree | Table:
        if part is None:
            return table(federation, len(name) * 31 + sum(name.encode()), 20)
        levels[name] = level(data.draw(PROTECTIONS))
        return {f"{name}-{i}": grown(one, f"{name}-{i}") for i, one in enumerate(part)}

    tree = grown(shape, "r")
    assert not isinstance(tree, Table)
    made = Nation(tmp_path_factory.mktemp("tree"), levels).build(tree)
    try:
        found = made.run(sums(federation, tree, data.draw(PROTECTIONS)))["result"]["seen"]
        made.settle()
        made.check_ledgers()
    finally:
        made.close()
    sites, value = leaves(tree), 1.0
    for seen in found:
        summed = [np.round(value * one["dose"].sum() * 2.0**20) / 2.0**20 for one in sites.values()]
        expected = np.clip(summed, -BOUND, BOUND).sum()
        assert seen["x"].tolist() == [expected, BOUND * len(sites)], "exact: multiples of the resolution, at the bound"
        assert (seen["n"], seen["sites"], seen["who"]) == (20 * len(sites), len(sites), tuple(tree))
        value = expected / 64


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["paillier", "ckks"])
def test_encrypted_sums_of_sums(federation: Any, nation: Any, protection: str) -> None:
    if protection == "ckks":
        pytest.importorskip("tenseal")
    tree = {
        name: small(federation, **{f"{name}-{i}": 5 * i + len(name) for i in range(3)}) for name in ("w", "ea", "sou")
    }
    chosen = {"sum": protection, "key_bits": 2048}
    levels = {"w": level("plain"), "ea": level("secagg"), "sou": Level.model_validate({"protection": chosen})}
    made = nation(tree, levels)
    (first, _) = made.run(sums(federation, tree, chosen))["result"]["seen"]  # type: ignore[arg-type]
    expected = sum(np.clip(one["dose"].sum(), -BOUND, BOUND) for one in leaves(tree).values())
    np.testing.assert_allclose(first["x"], [expected, 9 * BOUND], atol=1e-5)
    assert (first["n"], first["sites"]) == (180, 9)


def small(federation: Any, **names: int) -> Tree:
    return {name: table(federation, seed, 20) for name, seed in names.items()}


def test_a_single_site_is_clipped_to_the_bound_of_a_single_site(federation: Any, nation: Any) -> None:
    for protection in ("plain", "secagg"):
        tree = {"west": small(federation, loud=1, quiet=2), "east": small(federation, a=3, b=4)}
        made = nation(tree, {"west": level(protection), "east": level(protection)})
        (first, _) = made.run(sums(federation, tree, protection))["result"]["seen"]
        assert first["x"][1] == 4 * BOUND


def test_a_region_with_more_sites_than_the_plan_says_is_refused(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1, b=2, c=3), "east": small(federation, d=4)}
    made = nation(tree, {"west": level(), "east": level()})
    with pytest.raises(PlanError) as caught:
        made.run(sums(federation, tree, cohort={"members": 2}))
    assert caught.value.code == "cohort.members" and caught.value.where["site"] == "west" and not ASKED


def test_a_coordinator_does_not_believe_in_more_sites_than_the_plan_says(federation: Any, nation: Any) -> None:
    def boast(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Progress) -> Message:
            reply = endpoint(message, progress)
            return Message(reply.kind, {**reply.meta, "members": 10**9}) if reply.kind == "opened" else reply

        return answer if name == "a" else endpoint

    tree = small(federation, a=1, b=2)
    made = nation(tree, {}, wrap=boast)
    with pytest.raises(PlanError) as caught:
        made.run(sums(federation, tree))
    assert caught.value.code == "cohort.members" and caught.value.where["site"] == "a" and not ASKED


@pytest.mark.parametrize("members", [1, 8])
def test_what_regions_cannot_answer_is_refused_before_data_is_read(federation: Any, nation: Any, members: int) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, c=4)}
    cohort = {"min_sites": 1, "members": members}
    plan = federation.plan("test.region.gather", {}, leaves(tree), cohort=cohort)
    if members > 1:
        with pytest.raises(PlanError, match="regions answer only with sums"):
            check_plan(plan)
        return
    made = nation(tree, {"west": level(), "east": level()})
    with pytest.raises(AtollError) as caught:
        made.run(plan)
    told = caught.value.parts or [caught.value]
    assert {part.code for part in told} == {"region.reduction"} and not ASKED


def test_sites_approve_what_their_region_asks(federation: Any, nation: Any) -> None:
    strict = Policy.sandbox().model_copy(update={"protections": ("secagg",)})
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, c=3, d=4)}
    made = nation(tree, {"west": level("secagg"), "east": level("secagg")}, policies={"a": strict})
    made.run(sums(federation, tree, "plain"))
    opened = made.journals["a"].run(made.run_id)[1]
    asked = Plan.from_json(opened["plan"])
    assert asked.protection.sum == "secagg" and asked.cohort.sites == ("a", "b")
    assert asked.cohort.above == made.plan.hash and opened["hash"] != made.plan.hash
    assert opened["roster"].keys() == {"a", "b"}
    refused = nation(tree, {"west": level("plain"), "east": level()}, policies={"a": strict})
    with pytest.raises(PolicyError) as caught:
        refused.run(sums(federation, tree, "plain"))
    assert caught.value.code == "policy.protection" and not [name for name, _ in ASKED if name == "a"][2:]


def test_sites_refuse_a_sum_of_some_of_a_regions_sites(federation: Any, nation: Any) -> None:
    """Whom a round asks is chosen at the top; a region that asks fewer would learn what it must not."""

    def narrowed(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Progress) -> Message:
            if name in ("a", "b") and message.kind == "task":
                message = Message(message.kind, {**message.meta, "cohort": ["a", "b"]}, message.arrays)
            return endpoint(message, progress)

        return answer

    tree = {"west": small(federation, a=1, b=2, c=3), "east": small(federation, d=4)}
    made = nation(tree, {"west": level("secagg"), "east": level()}, wrap=narrowed)
    with pytest.raises(PolicyError) as caught:
        made.run(sums(federation, tree))
    assert caught.value.code == "policy.narrow-sum" and caught.value.where["site"] == "west"


def lost(names: set[str], first: int) -> Wrap:
    """From round *first* on, sites of these names cannot be reached."""

    def wrap(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Progress) -> Message:
            if message.kind == "task" and message.meta["round"] >= first:
                raise TransportError("transport.deadline", "gone")
            return endpoint(message, progress)

        return answer if name in names else endpoint

    return wrap


def test_a_city_that_loses_too_many_sites_drops_out_and_the_province_goes_on(federation: Any, nation: Any) -> None:
    tree = {
        "north": {"harbour": small(federation, a=1, b=2), "hill": small(federation, c=3, d=4)},
        "south": small(federation, e=5, f=6),
    }
    levels = {"harbour": level("secagg", min_sites=2), "hill": level(), "north": level(), "south": level()}
    made = nation(tree, levels, wrap=lost({"a"}, 1))
    before, after = made.run(sums(federation, tree))["result"]["seen"]
    assert (before["sites"], after["sites"]) == (6, 4)
    assert after["who"] == ("north", "south"), "the nation sees its provinces; north sees that harbour is gone"
    assert "harbour dropped out" in made.stores["north"].run(made.run_id)["note"]
    assert made.stores["nation"].run(made.run_id)["note"] == ""
    made.settle()
    made.check_ledgers()


def test_a_region_without_enough_sites_is_not_asked_for_fewer(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, c=3, d=4)}
    made = nation(tree, {"west": level(min_sites=2), "east": level()}, wrap=lost({"a"}, 0))
    seen = made.run(sums(federation, tree))["result"]["seen"]
    assert [one["sites"] for one in seen] == [2, 2] and [one["who"] for one in seen] == [("east",), ("east",)]
    made.settle()
    store = made.stores["west"]
    assert store.rounds(made.run_id) == [] and store.run(made.run_id)["status"] == "finished"
    note = made.stores["nation"].run(made.run_id)["note"]
    assert "west dropped out" in note and "region.lost" in note and "site a" not in note


def test_each_level_keeps_its_own_least_group(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1), "east": small(federation, c=3, d=4)}
    made = nation(tree, {"west": level("secagg"), "east": level("secagg")})
    with pytest.raises(AtollError) as caught:
        made.run(sums(federation, tree, "plain", params={"groups": True}, run={"min_group_size": 25}))
    assert caught.value.code == "disclosure.small-group" and caught.value.where["site"] == "west"
    wary = Policy.sandbox().model_copy(update={"min_group_size": 45})
    shown = nation(tree, {"west": level(), "east": level()}, policies={"east": wary})
    with pytest.raises(AtollError) as caught:
        shown.run(sums(federation, tree, "plain", params={"groups": True}, run={"min_group_size": 45}))
    assert caught.value.code == "disclosure.small-group" and caught.value.where["site"] == "east"


def test_cells_of_a_region_are_withheld_where_they_are_small() -> None:
    cells = Cells("n", "gone", values=("s",), lines=(0,), largest="most")
    total = Summed(
        {"n": np.array([9, 3, 12, 40]), "s": np.array([1.0, 2.0, 3.0, 4.0]), "gone": np.array([0, 0, 0, 2])}, ("a", "b")
    )
    shown = told_of(total, [cells], 5)
    assert shown["gone"].tolist() == [1, 1, 0, 1], "the small one, its complement, and what two sites withheld"
    assert shown["n"].tolist() == [0, 0, 12, 40] and shown["s"].tolist() == [0, 0, 3, 4]
    everything = told_of(total, [cells], 1)
    assert everything["n"].tolist() == [9, 3, 12, 40] and everything["gone"].tolist() == [0, 0, 0, 1]
    assert dict(told_of(total, [], 5)) == dict(total)


def test_regions_are_drawn_and_sent_their_effort_as_sites_are(federation: Any, nation: Any) -> None:
    """Two of three regions a round; each asks all of its sites, for the effort that it is asked for itself."""
    tree = {
        name: small(federation, **{f"{name}-{i}": 7 * i + len(name) for i in range(3)}) for name in ("w", "ea", "sou")
    }
    made = nation(
        tree, {"w": level("secagg", min_sites=3), "ea": level(min_sites=3), "sou": level("secagg", min_sites=3)}
    )
    params = {**LEARN, "rounds": 4, "sites_per_round": 2}
    cohort, run = {"min_sites": 2, "members": 3}, {"min_group_size": 1}
    plan = federation.plan("horizontal.fedavg", params, leaves(tree), protection="secagg", cohort=cohort, run=run,
                           schedule={"effort_min": 0.2})  # fmt: skip
    found = made.run(plan)["result"]
    assert len(found["history"]) == 4 and np.isfinite(found["model"].weights).all()
    asked = {name: len(made.stores[name].rounds(made.run_id)) for name in tree}
    assert sum(asked.values()) == 4 * 2
    made.settle()
    made.check_ledgers()


def test_rows_are_told_where_all_sites_tell_them(federation: Any, nation: Any) -> None:
    silent = Policy.sandbox().model_copy(update={"share": ()})
    eager = Policy.sandbox().model_copy(update={"share": ("rows", "metrics", "quality")})
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, c=3, d=4)}
    made = nation(tree, {"west": level(), "east": level()}, policies={"d": silent, "west": eager})
    made.run(sums(federation, tree))
    told = made.stores["nation"].result(made.run_id)[0]["sites"]
    assert told == {"west": {"rows": 40}, "east": {"rows": None}}


# ---------------------------------------------------------------- who comes back


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


def dying(function: Callable[..., Any], due: Callable[..., bool], deaths: list[str], *, after: bool) -> Any:
    """*function*, whose process is killed the first time that a call is *due*: before it, or after it."""

    def wrapped(*args: Any, **more: Any) -> Any:
        now = not deaths and due(*args)
        result = function(*args, **more) if after or not now else None
        if now:
            deaths.append("killed")
            raise Died
        return result

    return wrapped


def releases(task: str, *_: Any) -> bool:
    return task.split("/")[1] == "1" and task.split("/")[3] == "reply"


def finishes(_: str, number: int, *__: Any) -> bool:
    return number == 1


MOMENTS = ["before its sites are asked", "one of its sites answered", "its sum is stored", "before its release",
           "its release is stored", "the level above has it"]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("protection", ["plain", pytest.param("secagg", marks=pytest.mark.slow)])
def test_a_killed_region_comes_back_exactly(federation: Any, nation: Any, moment: str, protection: str) -> None:
    tree = {"west": small(federation, a=1, b=2), "east": small(federation, c=3, d=4)}
    levels = {"west": level(protection), "east": level(protection)}
    plan = sums(federation, tree, protection, params={"rounds": 3}, cohort={"on_dropout": "fail"})
    expected = nation(tree, levels).run(plan)["result"]
    deaths: list[str] = []

    def wrap(name: str, endpoint: Any) -> Any:
        def dies(message: Message, progress: Progress) -> Message:
            first = message.kind == "task" and message.meta["round"] == 1 and not deaths
            if first and name == "b" and moment == "one of its sites answered":
                deaths.append(name)
                raise Died
            if first and name == "west" and moment == "before its sites are asked":
                deaths.append(name)
                made.restart("west")
            try:
                return (made.regions[name].handle if name == "west" else endpoint)(message, progress)
            except Died:
                if name != "west":
                    raise
                deaths.append(name)
                made.restart("west")
                return made.regions["west"].handle(message, progress)

        return dies

    made = nation(tree, levels, wrap=wrap, durable=True)
    west, journal, top = made.stores["west"], made.journals["west"], made.stores["nation"]
    if moment == "its sum is stored":
        west.finish_round = dying(west.finish_round, finishes, deaths, after=True)
    elif moment in ("before its release", "its release is stored"):
        after = moment == "its release is stored"
        journal.store_release = dying(journal.store_release, releases, deaths, after=after)
    elif moment == "the level above has it":
        top.finish_round = dying(whole := top.finish_round, finishes, deaths, after=False)
        with pytest.raises(Died):
            made.run(plan)
        made.restart("west")
        top.finish_round = whole
        again = Coordinator(made.top.transport, top, top.ledger(*made.keys["nation"]))
        found = asyncio.run(again.run(made.run_id))
    if moment != "the level above has it":
        found = made.run(plan)
    assert deaths
    same(found["result"], expected, rtol=0)
    made.settle()
    made.check_ledgers()
    if protection == "plain":
        assert len(ASKED) == 2 * 4 * 3, "nobody computed twice, in either run"


def test_a_round_is_not_answered_in_other_words(federation: Any, nation: Any) -> None:
    tree = {"west": small(federation, a=1, b=2)}
    made = nation(tree, {"west": level()})
    made.run(sums(federation, tree))
    made.settle()
    below, run = made.regions["west"]._below, made.run_id
    assert below.coordinator.store.reduced(run, 0) is None and len(below.coordinator.store.rounds(run)) == 2, (
        "the level above has it"
    )
    plan, other = below.coordinator.store.run(run)["plan"], "f" * 32
    below.coordinator.store.create_run(plan, ("a", "b"), other, "running")

    async def ask(value: float, question: str) -> Any:
        fields = {"x": real(2, bound=BOUND, step=2.0**-30), "n": count(bound=1000), "sites": count(bound=1)}
        params = {"rounds": 2, "groups": False}
        asked = Round("plainly", Sum(), fields, {"value": value}, program="test.region.sums", params=params)
        return await below.asked(other, asked, 0, question)

    async def twice() -> None:
        await below.opened(other)
        total = await ask(1.0, "one")
        assert (await ask(1.0, "one")).arrays["x"].tolist() == total["x"].tolist()
        with pytest.raises(ProtocolError, match="in other words"):
            await ask(2.0, "two")

    asyncio.run_coroutine_threadsafe(twice(), made.loops[0]).result(30)
    assert len(ASKED) == 2 * 2 + 2


# ---------------------------------------------------------------- a region's folder


def test_a_regions_folder_says_where_its_two_sides_are(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not set up"):
        RegionHome(tmp_path / "region")
    CoordinatorHome.create(tmp_path / "region" / "coordinator", CoordinatorConfig())
    config = RegionConfig(site="site", coordinator="coordinator", protection="secagg")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="atoll site init"):
        RegionHome.create(tmp_path / "region", config)
    site = tmp_path / "region" / "site"
    site.mkdir()
    Identity.generate("north").save(site / "identity.key")
    (site / "site.yaml").write_text(yaml.safe_dump({"name": "north", "address": "x:1", "coordinator_key": "00"}))
    (site / "policy.yaml").write_text("min_sites: 3")
    (site / "ca.pem").write_bytes(b"")
    made = RegionHome.create(tmp_path / "region", config)
    assert made.level == config and made.site.config.name == "north"
    assert "protection: secagg" in (tmp_path / "region" / "region.yaml").read_text()
    with pytest.raises(PlanError, match="set up already"):
        RegionHome.create(tmp_path / "region", config)
    (tmp_path / "region" / "region.yaml").write_text("site: site\ncoordinator: coordinator\ncohort: {min_site: 2}\n")
    with pytest.raises(PlanError, match="min_sites"):
        RegionHome(tmp_path / "region")


def test_options_of_a_protection_are_written_down() -> None:
    level = Level.model_validate({"protection": {"sum": "paillier", "key_bits": 2048}})
    assert level.told() == {"sum": "paillier", "key_bits": 2048}
