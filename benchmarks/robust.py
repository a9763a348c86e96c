"""Accuracy of robust rules under attack: MNIST at twenty sites, of which four or eight are attackers.

Each site has 600 training images, drawn alike or with shares of each digit by Dirichlet's distribution (α = 1), and
takes four steps of 32 of them in a round; a perceptron of 16 hidden units, 20 rounds, the average by FedAvg. Attacks:

* label flip: attackers learn digit 9 − y instead of y.
* sign flip: they send the opposite of what they learned, four times as long.
* ALIE (Baruch et al. 2019, A Little Is Enough): a coalition that knows how many it is against sends the mean of its own
  honest changes, less as many standard deviations as a majority of honest sites still hides.
* adapted (Shejwalkar & Houmansadr 2021, Manipulating the Byzantine, §4, by search instead of bisection; with full
  knowledge): a coalition that sees all honest changes, and knows the rule and its groups, sends the vector, of ten
  along two directions, that turns the rule's result furthest from the honest mean.
* backdoor: half of each attacker's images have a patch of 4 × 4 white pixels and the label 0, and its change is sent
  three times as long (Bagdasaryan et al. 2020). Its success is the share of the other digits' test images that the
  patch turns into a 0.

Rules are told the number of attackers. FLTrust's root is an honest site; "groups" are the means of ten groups of two
sites drawn anew each round (of which attackers may spoil four, or eight), of which the median is taken. Bulyan needs
4f + 3 sites. The peer of each row is the mean under the same attack. Accuracy is of 3,000 test images after the last
round. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from atoll.aggregation.rule import RULES, Aggregation
from atoll.contract.fields import as_arrays
from atoll.contract.program import Cohort, Program, build, handler_of
from atoll.contract.rounds import Gather, Gathered, Round, Summed, Task, TaskId, Together
from atoll.data.table import Table
from atoll.runtime.catalogue import load_installed
from benchmarks.learning import Desk
from benchmarks.mnist import SCHEMA, digits, of
from benchmarks.table import Row, main

SEED, SITES, IMAGES, ROUNDS = 0, 20, 600, 20
PARTITIONS: dict[str, float | None] = {"alike": None, "Dirichlet": 1.0}
MODEL = {"kind": "mlp", "image": "image", "hidden": [16]}
PARAMS = {"model": MODEL, "target": "digit", "local_steps": 4, "batch_size": 32, "learning_rate": 0.5}
ATTACKS = ("none", "label flip", "sign flip", "ALIE", "adapted", "backdoor")
ATTACKERS = (4, 8)
NAMES = (
    "mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan", "norm_clipping",
    "centred_clipping", "fltrust", "groups",
)  # fmt: skip
GROUPS = 10
PATCH = slice(22, 26)
TARGET = 0
Floats = NDArray[np.float64]
Reply = dict[str, NDArray[Any]]


def aggregate(name: str, attackers: int) -> dict[str, Any]:
    """The plan's ``aggregate`` of a column."""
    if name == "mean":
        return {}
    if name == "groups":
        return {"rule": "median", "groups": GROUPS, "attackers": min(attackers, (GROUPS - 1) // 2)}
    return {"rule": name, "attackers": attackers, **({"root": site(SITES - 1)} if RULES[name].rooted else {})}


def site(number: int) -> str:
    """Its name; the first are the attackers."""
    return f"site-{number:02d}"


@cache
def parts(alpha: float | None) -> list[NDArray[np.int64]]:
    """Rows of the training images for each site, none for two."""
    random = np.random.default_rng(SEED)
    labels, shares = digits()["y_train"], np.full((SITES, 10), 0.1)
    left = [list(random.permutation(np.flatnonzero(labels == digit))) for digit in range(10)]
    if alpha is not None:
        shares = random.dirichlet(np.full(10, alpha), SITES)
    found = []
    for own in shares:
        wanted = random.multinomial(IMAGES, own)
        found.append(
            np.array([left[digit].pop() for digit in range(10) for _ in range(min(wanted[digit], len(left[digit])))])
        )
    return found


def patched(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With the trigger."""
    found = images.copy()
    found[:, PATCH, PATCH] = 255
    return found


def table(rows: NDArray[np.int64], attack: str) -> Table:
    """What a site learns from."""
    images, labels = digits()["x_train"][rows], digits()["y_train"][rows]
    if attack == "label flip":
        return of(images, 9 - labels)
    if attack == "backdoor":
        half = np.random.default_rng(SEED).random(len(rows)) < 0.5
        return of(np.where(half[:, None, None], patched(images), images), np.where(half, TARGET, labels))
    return of(images, labels)


# ---------------------------------------------------------------- what attackers make of their changes


Result = Callable[[Floats], Floats]
"""All sites' changes [num_sites, size] → what the coordinator makes of them."""


def sent(attack: str, changes: Floats, attackers: int, result: Result) -> Floats:
    """The attackers' changes [attackers, size] of all sites' honest ones [num_sites, size], the attackers' first."""
    own = changes[:attackers]
    if attack == "sign flip":
        return -4 * own
    if attack == "backdoor":
        return 3 * own
    if attack == "ALIE":
        needed = len(changes) // 2 + 1 - attackers
        most = float(norm.ppf((len(changes) - attackers - needed) / (len(changes) - attackers)))
        return np.tile(own.mean(0) - most * own.std(0), (attackers, 1))
    if attack == "adapted":
        return np.tile(furthest(changes, attackers, result), (attackers, 1))
    return own


def furthest(changes: Floats, attackers: int, result: Result) -> Floats:
    """The vector that, sent by all attackers, turns the result furthest from the honest mean."""
    honest = changes[attackers:]
    mean, spread = honest.mean(0), honest.std(0)
    length, best, chosen = float(np.linalg.norm(mean)), math.inf, changes[0]
    for direction in (-mean / (length or 1.0), -np.sign(mean) * spread / (float(np.linalg.norm(spread)) or 1.0)):
        for step in np.geomspace(0.3, 30, 5):
            crafted = mean + step * length * direction
            reached = float(result(np.vstack([np.tile(crafted, (attackers, 1)), honest])) @ mean)
            if reached < best:
                best, chosen = reached, crafted
    return np.asarray(chosen)


# ---------------------------------------------------------------- a run


@dataclass
class Sites:
    """The desks of all sites, the first of them attackers', and the program as each of them runs it."""

    tables: Sequence[Table]
    params: Mapping[str, Any]
    attack: str
    attackers: int

    def __post_init__(self) -> None:
        self.desks = {site(i): Desk(site(i), *table.parts()) for i, table in enumerate(self.tables)}
        self.programs: dict[str, Program] = {name: build("horizontal.fedavg", self.params) for name in self.desks}
        self.aggregate: Aggregation = self.programs[site(0)].params.aggregate

    def answers(self, rounds: Sequence[Round], number: int) -> dict[str, Reply]:
        """By site, of rounds asked at the same time."""
        replies: dict[str, Reply] = {}
        for asked in rounds:
            for name in self.desks if asked.sites is None else asked.sites:
                made, sent_ = self.programs[name], {n: np.asarray(v) for n, v in asked.send.items()}
                task = Task(TaskId("0" * 32, number, 0, "reply", name), sent_, (SEED, number, *name.encode()))
                replies[name] = as_arrays(
                    handler_of(made, asked.name).answer(made, self.desks[name], task), asked.reply
                )
        ordered = [replies[name] for name in self.desks]
        weights = np.array([float(reply["weight"]) for reply in ordered])
        changes = np.stack([reply["weights"] for reply in ordered]) / weights[:, None]
        groups = [[list(self.desks).index(name) for name in asked.sites] for asked in rounds if asked.sites is not None]

        def result(all_changes: Floats) -> Floats:
            if self.aggregate.rule == "mean":
                return np.asarray(np.average(all_changes, axis=0, weights=weights))
            means = np.stack([all_changes[group].mean(0) for group in groups]) if groups else all_changes
            names = [site(i) for i in range(len(means))]
            return np.asarray(self.aggregate.combine({"weights": means}, names).values["weights"])

        bad = sent(self.attack, changes, self.attackers, result)
        for place in range(self.attackers):
            clip = float(self.params.get("clip", 10.0))
            ordered[place]["weights"] = (np.clip(bad[place], -clip, clip) * weights[place]).astype(
                ordered[place]["weights"].dtype
            )
        return replies


def run(name: str, attack: str, attackers: int, alpha: float | None, rounds: int = ROUNDS) -> dict[str, Any]:
    """{"accuracy", "backdoor", "suspects", …} of one run."""
    params = {**PARAMS, "rounds": rounds, "aggregate": aggregate(name, attackers)}
    tables = [table(rows, attack if i < attackers else "none") for i, rows in enumerate(parts(alpha))]
    sites = Sites(tables, params, attack, attackers)
    steps, number = build("horizontal.fedavg", params).coordinate(Cohort(tuple(sites.desks), SCHEMA, SEED)), 0
    value: Any = None
    while True:
        try:
            asked: Any = steps.send(value)
        except StopIteration as stop:
            return {
                **scores(stop.value["model"]),
                "suspects": stop.value.get("suspects"),
                "trust": stop.value.get("trust"),
            }
        value = None
        if isinstance(asked, Round | Together):
            these = asked.rounds if isinstance(asked, Together) else (asked,)
            replies = sites.answers(these, number)
            number += len(these)
            made = tuple(reduced(one, replies) for one in these)
            value = made if isinstance(asked, Together) else made[0]


def reduced(asked: Round, replies: Mapping[str, Reply]) -> Any:
    """As the coordinator would."""
    own = {name: replies[name] for name in (replies if asked.sites is None else asked.sites)}
    if isinstance(asked.reduce, Gather):
        return Gathered(own)
    return Summed({name: np.sum([reply[name] for reply in own.values()], 0) for name in asked.reply}, tuple(own))


def scores(model: Any) -> dict[str, float]:
    """Accuracy on test images, and how often the trigger turns another digit into the target."""
    images, labels = digits()["x_test"], digits()["y_test"]
    others = labels != TARGET
    right = model.predict(of(images, labels)).argmax(1) == labels
    fooled = model.predict(of(patched(images[others]), labels[others])).argmax(1) == TARGET
    return {"accuracy": float(right.mean()), "backdoor": float(fooled.mean())}


def possible(name: str, attackers: int) -> bool:
    """Does the rule take so many attackers among the sites?"""
    return name in ("mean", "groups") or RULES[name].least(attackers) <= SITES


def one(work: tuple[str, str, int, str, int]) -> Row:
    """One cell of the table."""
    load_installed()
    name, attack, attackers, partition, rounds = work
    label = f"{partition}, {attackers} of {SITES} by {attack}, {name}" if attackers else f"{partition}, none, {name}"
    found = run(name, attack, attackers, PARTITIONS[partition], rounds)
    bad = {site(i) for i in range(attackers)}
    named = {suspect["site"] for suspect in found["suspects"] or ()}
    told = {"backdoor": round(100 * found["backdoor"], 1), "named": len(named & bad), "wrongly named": len(named - bad)}
    return Row(label, round(100 * found["accuracy"], 1), "%", note=json.dumps(told))


def measure(quick: bool) -> list[Row]:
    """Every rule under every attack."""
    load_installed()
    partitions = ("alike",) if quick else tuple(PARTITIONS)
    rules = ("mean", "median", "groups") if quick else NAMES
    work = [(name, "none", 0, partition, 5 if quick else ROUNDS) for partition in partitions for name in rules]
    for partition in partitions:
        for attackers in ATTACKERS[:1] if quick else ATTACKERS:
            for attack in ("sign flip", "backdoor") if quick else ATTACKS[1:]:
                able = [name for name in rules if possible(name, attackers)]
                work += [(name, attack, attackers, partition, 5 if quick else ROUNDS) for name in able]
    rows = []
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(one, work):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    means = {row.name.rpartition(", ")[0]: row.value for row in rows if row.name.endswith(", mean")}
    return [replace(row, peer=means[row.name.rpartition(", ")[0]]) for row in rows]


if __name__ == "__main__":
    main("robust", ("numpy", "torch"), measure, SEED)
