"""What sites hold alike: they catch up, and a coordinator that changes its story is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.contract.fields import as_arrays
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import APART, Metrics, Round, Summed, Task, TaskId
from atoll.trees.replica import Log, Replica, received

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "kind": {"dtype": "text", "values": ["x", "y", "z"]},
    "value": {"range": [-80, 80], "role": "label"},
}
PARAMS = {"target": "value", "trees": 3, "max_depth": 2, "max_bins": 8, "binning": "even", "min_rows": 2}


def task(told: Mapping[str, Any]) -> Task:
    return Task(TaskId("0" * 32, 0, 0, "reply", "s"), {name: np.asarray(value) for name, value in told.items()}, (0,))


# ---------------------------------------------------------------- the log


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 3), st.sets(st.sampled_from("abc"))), min_size=1, max_size=8))
def test_every_site_has_the_same_log_whenever_it_answers(rounds: list[tuple[int, set[str]]]) -> None:
    """rounds: (how many records are new, which sites take part). A site may also answer without being heard."""
    replica, states, random = Replica(("a", "b", "c")), dict[str, dict[str, Any]](a={}, b={}, c={}), iter(range(1000))
    for new, sites in rounds:
        for _ in range(new):
            replica.add(np.full(next(random) % 4, float(next(random))))
        told, apart = replica.sent()
        for site in sites | {"c"}:
            log = received(task({**told, **apart.get(site, {})}), states[site])
            states[site].update(log.arrays())
            assert log.digests[-1] == replica.log.digests[-1]
        replica.answered(sites)
        again = Replica(("a", "b", "c"))
        again.restore(replica.arrays())
        assert (again.has, again.asked, again.log.digests) == (replica.has, replica.asked, replica.log.digests)


def test_a_digest_covers_all_before_it_and_where_records_end() -> None:
    one, other = Log([np.array([1.0, 2.0])]), Log([np.array([1.0]), np.array([2.0])])
    assert one.digests[-1] != other.digests[-1]
    assert Log([np.zeros(0), np.array([1.0])]).digests[-1] != Log([np.array([1.0])]).digests[-1]


# ---------------------------------------------------------------- a coordinator that lies


class Played:
    """An honest run up to a round, and one site's answer to whatever is asked next."""

    def __init__(self, federation: Any, until: int, params: Mapping[str, Any] = PARAMS) -> None:
        random = np.random.default_rng(1)
        data = {"a": random.normal(0, 1, 80), "kind": random.choice(["x", "y", "z"], 80).astype(object)}
        data["value"] = 5 * data["a"] ** 2 + (data["kind"] == "x")
        self.table = federation.table(data, COLUMNS)
        self.program = build("trees.boosted", dict(params))
        self.site = _Desk("s", self.table, self.table.rows(np.zeros(80, bool)))
        steps, value, asked = self.program.coordinate(Cohort(("s",), self.table.schema, 7)), None, 0
        while True:
            item = steps.send(value)
            value = False if isinstance(item, Metrics) else None
            if isinstance(item, Round):
                if asked == until:
                    self.item = item
                    return
                value, asked = Summed(self.answer(item), ("s",)), asked + 1

    def answer(self, item: Round) -> dict[str, np.ndarray]:
        before = dict(self.site.state)
        try:
            reply = handler_of(self.program, item.name).answer(self.program, self.site, task(item.send))
        except ProtocolError:
            self.site.state = before  # a journal keeps only what led to a release
            raise
        return as_arrays(reply, item.reply)


class _Desk:
    def __init__(self, name: str, table: Any, holdout: Any) -> None:
        self.name, self.table, self.holdout, self.state = name, table, holdout, dict[str, Any]()
        self.min_group_size = 1

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""


def changed(**arrays: Any) -> Callable[[Round], Round]:
    return lambda item: replace(item, send={**item.send, **arrays})


def told(item: Round, record: Any) -> Round:
    """The round with another last record, and its honest digest."""
    version = np.asarray(item.send["version"])
    record = np.asarray(record, np.float64).reshape(-1)
    sizes = np.array([len(record)], np.int64)
    return replace(item, send={**item.send, "records": record, "sizes": sizes, "version": version})


def with_digest(played: Played, item: Round) -> Round:
    log = Log([*Log.of(played.site.state).records, np.asarray(item.send["records"])])
    return replace(item, send={**item.send, "digest": np.frombuffer(log.digests[-1], np.uint8)})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (changed(digest=np.zeros(32, np.uint8)), "trees.other-trees"),
        (changed(digest=np.zeros(31, np.uint8)), "task.array"),
        (changed(version=np.array([2, 1])), "task.array"),
        (changed(version=np.array([0.0, 1.0])), "task.array"),
        (changed(version=np.array([5, 6])), "trees.no-base"),
        (changed(version=np.array([0, 1])), "trees.other-trees"),
        (changed(records=np.array([np.nan])), "task.array"),
        (changed(sizes=np.array([-1])), "task.array"),
        (changed(sizes=np.array([2**62, 2**62, 5 - 2**63])), "task.array"),
        (changed(nodes=np.array([[0, 3]])), "trees.out-of-turn"),
        (changed(nodes=np.array([[0, 0]])), "trees.out-of-turn"),
        (changed(nodes=np.array([[1, 1]])), "trees.out-of-turn"),
        (changed(nodes=np.array([[0, 2**40]])), "trees.out-of-turn"),
        (changed(nodes=np.array([[0, -1]])), "task.array"),
        (changed(nodes=np.array([0, 1])), "task.array"),
        (changed(nodes=np.array([[0.0, 1.0]])), "task.array"),
        (changed(columns=np.array([0, 0])), "task.array"),
        (changed(columns=np.array([2])), "task.array"),
        (changed(columns=np.zeros(0, np.int64)), "task.array"),
        (lambda item: replace(item, name="root"), "trees.out-of-turn"),
        (lambda item: replace(item, name="leaves"), "trees.out-of-turn"),
        (lambda item: replace(item, name="share"), "trees.out-of-turn"),
        (lambda item: replace(item, name="renew", send={**item.send, "leaves": np.array(4)}), "trees.out-of-turn"),
    ],
)
def test_what_the_trees_do_not_lead_to_is_refused(federation: Any, change: Any, code: str) -> None:
    """Round 2 is the second level of the first tree."""
    played = Played(federation, 2)
    assert played.item.name == "level"
    with pytest.raises(ProtocolError) as caught:
        played.answer(change(played.item))
    assert caught.value.code == code
    played.answer(played.item)  # the honest round is still answered


@pytest.mark.parametrize(
    "words",
    [
        [0, 0.123456, 1, 0, 0],  # no edge
        [0, 1e300, 1, 0, 0],
        [1, 8, 1, 0, 0],  # a category that there is not
        [1, 0, 1, 0, 0],
        [1, 1.5, 1, 0, 0],
        [2, 0, 1, 0, 0],  # a feature that there is not
        [0.5, 0, 1, 0, 0],
        [-2, 0, 1, 0, 0],
        [-1, 1e300, 0, 0, 0],  # no float32
        [-1, 0.1, 0, 0, 0],
        [0, 0, 2, 0, 0],
        [0, 0, 1, 0, -1],
        [0, 0, 1, 0],
        [0, 0, 1, 0, 0, -1, 0, 0, 0, 0],  # of a node that is not open
    ],
)
def test_records_that_make_no_trees_are_refused(federation: Any, words: list[float]) -> None:
    played = Played(federation, 2)
    lie = with_digest(played, told(played.item, words))
    with pytest.raises(ProtocolError) as caught:
        played.answer(lie)
    assert caught.value.code == "trees.bad-record"
    played.answer(played.item)


@pytest.mark.parametrize("edges", [[1, 0, 3.0, 3.0], [0, 0, 1.0], [3, 0, 1.0, 2.0], [-1, 0], [2, 0, 2.0, 1.0],
                                   [1, 0, 0.1], [1, 1, 0.0, 1.0], [1e9, 0]])  # fmt: skip
def test_edges_that_are_none_are_refused(federation: Any, edges: list[float]) -> None:
    played = Played(federation, 1)
    assert played.item.name == "root"
    with pytest.raises(ProtocolError) as caught:
        played.answer(with_digest(played, told(played.item, [0.0, *edges])))
    assert caught.value.code == "trees.bad-record"


def test_a_tree_that_was_told_is_not_told_anew(federation: Any) -> None:
    """The same level with other splits above it, as a later round: another part of the rows."""
    played = Played(federation, 2)
    played.answer(played.item)
    other = with_digest(Played(federation, 2), told(played.item, [1, 1, 1, 0, 80]))
    nodes = np.array([[0, 1]])
    with pytest.raises(ProtocolError) as caught:
        played.answer(replace(other, send={**other.send, "nodes": nodes}))
    assert caught.value.code == "trees.other-trees"


def test_other_edges_in_mid_run_are_refused(federation: Any) -> None:
    played = Played(federation, 2)
    first = Log.of(played.site.state).records[0].copy()
    first[-1] += 1
    log = Log([first])
    send = {"version": np.array([0, 1]), "digest": np.frombuffer(log.digests[-1], np.uint8), **log.arrays()}
    with pytest.raises(ProtocolError) as caught:
        played.answer(replace(played.item, name="root", send={**send, "nodes": np.array([[0, 0]])}))
    assert caught.value.code == "trees.other-trees"


def test_more_trees_than_the_plan_has_are_refused(federation: Any) -> None:
    played = Played(federation, 7, {**PARAMS, "max_depth": 2})
    assert played.item.name == "losses"
    replica = Replica(("s",))
    for record in received(task(played.item.send), played.site.state).records:
        replica.add(record)
    replica.add(np.array([-1.0, 0, 0, 0, 0]))
    lie = replace(played.item, send=replica.sent()[0])
    with pytest.raises(ProtocolError) as caught:
        played.answer(lie)
    assert caught.value.code == "trees.bad-record"


def test_what_single_sites_are_sent_is_no_part_of_the_question(federation: Any) -> None:
    replica = Replica(("a", "b"))
    for value in range(3):
        replica.add(np.array([float(value)]))
        _, apart = replica.sent()
        replica.answered(["a"])
    assert set(apart) == {"b"}
    assert all(name.startswith(APART) for name in apart["b"])
