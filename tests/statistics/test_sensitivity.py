"""What handlers declare of one record is true.

For every example of a program: its rounds are asked of a real table and of the same table without one record
(often an extreme one), and the difference of each field is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import DisclosureError, ProtocolError
from atoll.contract.program import REGISTRY, build, handler_of
from atoll.contract.rounds import Round, Sum

from .examples import (
    REFUSED,
    Desk,
    answered,
    every_example,
    norms_of,
    played,
    sent_of,
    tables_of,
)


def changed(item: Round, whole: Desk, without: Desk) -> Iterator[tuple[str, float, float]]:
    one, other = answered(item, whole), answered(item, without)
    for told in item.reply:
        change = np.abs(one[told].astype(np.float64) - other[told].astype(np.float64))
        yield told, float(change.sum()), math.sqrt(float((change**2).sum()))


def adversarial(item: Round, random: np.random.Generator) -> Round:
    """The same round with other arrays of the coordinator's choice."""
    send = {}
    for name, value in sent_of(item).items():
        made = value * random.uniform(0.5, 2, value.shape) + random.normal(0, 1, value.shape)
        send[name] = np.abs(made) if name == "scale" else np.sort(made, axis=-1) if name == "edges" else made
        if name == "grades":
            send[name] = np.clip(made, -1, 1)
    return Round(item.name, item.reduce, item.reply, send, program=item.program, params=item.params)


# ---------------------------------------------------------------- what one record changes


@pytest.mark.parametrize("exact", [True, False])
@every_example
def test_no_record_changes_more_than_is_declared(
    federation: Any, name: str, params: dict[str, Any], missing: bool, exact: bool
) -> None:
    tables = tables_of(federation, missing)
    _, rounds = played(name, params, tables, exact)
    random, table = np.random.default_rng(5), tables["s0"]
    for turned in (None, 1, 2):
        asked = [adversarial(item, random) if turned else item for item in rounds]
        for left_out in itertools.chain(range(0, 16, 4), random.integers(0, len(table), 4)):
            keep = np.arange(len(table)) != left_out
            empty = table.rows(np.zeros(len(table), bool))
            whole, without = Desk("s0", table, empty), Desk("s0", table.rows(keep), empty)
            for item in asked:
                if not isinstance(item.reduce, Sum) or f"{item.program}/{item.name}" in REFUSED:
                    continue
                try:
                    changes = list(changed(item, whole, without))
                except ProtocolError:
                    assert turned, "an honest round is refused"
                    continue
                norms = norms_of(item, table.schema)
                assert set(norms) == set(item.reply)
                for element, l1, l2 in changes:
                    told = norms[element]
                    where = f"{item.program}/{item.name}: {element}"
                    assert l1 <= told.l1 * (1 + 1e-7) + 1e-7, f"{where}: L1 {l1} > {told.l1}"
                    assert l2 <= told.l2 * (1 + 1e-7) + 1e-7, f"{where}: L2 {l2} > {told.l2}"


@every_example
def test_what_is_declared_is_not_far_above_what_happens(
    federation: Any, name: str, params: dict[str, Any], missing: bool
) -> None:
    """Of all records at the ends of ranges, some change each field by a good part of its norm: else noise is wasted."""
    tables = tables_of(federation, missing=False)
    _, rounds = played(name, params, tables, exact=False)
    table, most = tables["s0"], dict[tuple[int, str], float]()
    empty = table.rows(np.zeros(len(table), bool))
    for left_out in range(40):
        whole, without = Desk("s0", table, empty), Desk("s0", table.rows(np.arange(40) != left_out), empty)
        for number, item in enumerate(rounds):
            for told_field, _, l2 in changed(item, whole, without):
                most[number, told_field] = max(most.get((number, told_field), 0.0), l2)
    for (number, told_field), found in most.items():
        item = rounds[number]
        told = norms_of(item, table.schema)[told_field].l2
        small = {"dropped", "flags", "apart", "single", "left_out", "unlabelled", "months", "timed"}
        if told and told_field not in small:
            assert found > told / 12, f"{item.program}/{item.name}: {told_field} {found} of {told}"


def test_what_declares_nothing_is_known() -> None:
    quiet = {
        f"{name}/{asked}"
        for name, cls in REGISTRY.items()
        if cls.__module__.startswith("atoll.statistics") or name == "horizontal.glm"
        for asked, handler in cls.handlers.items()
        if handler.reduce == "sum" and handler.record is None
    }
    assert quiet - {"statistics.evaluation/scores", "statistics.evaluation/personal"} == REFUSED


def test_the_achieved_anonymity_is_not_declared(federation: Any) -> None:
    tables = tables_of(federation, missing=True)
    made = build("statistics.preparation", {"reasons": ["duplicate rows"], "anonymity": True})
    record = handler_of(made, "left out").record
    assert record is not None
    assert not record(made, tables["s0"].schema, {})


CELLS = {"statistics.frequency", "statistics.woe", "statistics.survival", "horizontal.glm"}


@every_example
def test_cells_are_not_told_where_others_see_a_sites_own(
    federation: Any, name: str, params: dict[str, Any], missing: bool
) -> None:
    """What is asked under noise alone would, beside merged counts, tell small groups."""
    tables = tables_of(federation, missing)
    table, refused = tables["s0"], 0
    seen = {(item.program, item.name) for item in played(name, params, tables, exact=True)[1]}
    for item in played(name, params, tables, exact=False)[1]:
        if (item.program, item.name) not in seen:
            with pytest.raises(DisclosureError) as caught:
                answered(item, Desk("s0", table, table.rows(np.zeros(len(table), bool)), min_group_size=5))
            assert caught.value.code == "disclosure.cells"
            refused += 1
    assert refused or (name not in CELLS and params.get("method") != "spearman")


def test_edges_that_do_not_rise_are_refused(federation: Any) -> None:
    """Differences of counts at such edges would change in many places with one record."""
    tables = tables_of(federation, missing=True)
    _, (item, _) = played("statistics.correlation", {"method": "spearman", "bins": 64}, tables, exact=False)
    edges = np.asarray(item.send["edges"])[:, ::-1].copy()
    turned = Round(item.name, item.reduce, item.reply, {"edges": edges}, program=item.program, params=item.params)
    desk = Desk("s0", tables["s0"], tables["s0"])
    for ask in (lambda: answered(turned, desk), lambda: norms_of(turned, tables["s0"].schema)):
        with pytest.raises(ProtocolError) as caught:
            ask()
        assert (caught.value.code, caught.value.field) == ("task.array", "edges")
