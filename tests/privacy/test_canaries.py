"""Planted values: with protection plain they are found in what the coordinator sees; with secagg nowhere at all.

Every site's replies are numbers that occur nowhere else. They are looked for in every encoding that this code base
has for them: floats of 8 and 4 bytes, integers of 8 and 4, fixed point in rings of 32, 64 and 128 bits, and
decimal text: in each message, in every file of every party, in logs, errors, events, results and the report's page.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, TransportError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.wire import decode
from atoll.crypto.identity import Identity
from atoll.privacy.fixed_point import Layout
from atoll.report.html import page
from atoll.runtime.journal import Journal
from atoll.runtime.results import details
from atoll.transport.base import Endpoint, Progress

SITES = ("s0", "s1", "s2", "s3")
FIELDS = {
    "narrow": real(2, bound=2e4, step=1e-4),
    "wide": real(2, bound=1e9, step=1e-6),
    "widest": real(bound=1e20, step=1e-9),
    "small": count(2, bound=10**8),
    "large": count(2, bound=10**14),
}
COLUMNS = {"x": {"range": [0, 1]}}


def planted(site: str) -> dict[str, np.ndarray]:
    """What a site answers: no two numbers alike, and none round."""
    random = np.random.default_rng([2718, *site.encode()])
    return {
        "narrow": random.uniform(9_000, 19_000, 2),
        "wide": random.uniform(-9e8, -1e8, 2),
        "widest": random.uniform(1e18, 9e18, ()),
        "small": random.integers(2 * 10**7, 9 * 10**7, 2),
        "large": random.integers(10**12, 9 * 10**13, 2),
    }


@program("test.canary", needs={"sum"}, offers={"bounded", "resolution"})
class Canary:
    """Two rounds of planted sums; the named site fails in the second."""

    class Params(ProgramParams):
        fails: str = ""

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        told = {}
        for _ in range(2):
            total = yield Round("told", Sum(), FIELDS)
            told = {name: np.asarray(total[name]).tolist() for name in FIELDS}
        return {"statistics": told}

    @handler("told")
    def told(self, site: SiteView, task: Task) -> Reply:
        if site.name == self.params.fails and task.id.round == 1:
            raise ValueError(f"the cell is {planted(site.name)['small'][0]}")
        site.state["calls"] = np.ones(())
        return planted(site.name)


@dataclass(frozen=True)
class Needle:
    """One way to write one planted number."""

    site: str
    field: str
    encoding: str
    data: bytes


def needles() -> list[Needle]:
    """Every planted number of every site in every encoding; the shortest are seven bytes, so that none is found by
    chance."""
    found = []
    layout = Layout.of(FIELDS, len(SITES))
    for site in SITES:
        reply = planted(site)
        for name, field in FIELDS.items():
            alone = Layout({name: field}, {name: layout.widths[name]})
            [ring] = alone.encode({name: reply[name]}).values()
            values = np.atleast_1d(reply[name]).tolist()
            ways = [("ring", ring.tobytes()), ("float32", struct.pack(f"<{len(values)}f", *values))]
            for value in values:
                ways += [("float64", struct.pack("<d", value)), ("float64 big-endian", struct.pack(">d", value))]
                ways += _texts(value)
            for bits in (32, 64):
                whole = [round(value / field.step) for value in values]
                if max(map(abs, whole)) < 2 ** (bits - 1):
                    ways.append((f"integers of {bits} bits", np.array(whole, f"<i{bits // 8}").tobytes()))
            found += [Needle(site, name, way, data) for way, data in ways if len(data.strip(b"\0")) >= 7]
    return found


def _texts(value: float) -> list[tuple[str, bytes]]:
    if isinstance(value, int):
        ways = {"decimal": str(value), "decimal with commas": f"{value:,}", "hexadecimal": f"{value:x}"}
    else:
        ways = {"decimal": repr(abs(value))[:10], "rounded": f"{abs(value):.9g}"}
    return [(way, text.encode()) for way, text in ways.items()]


NEEDLES = needles()


def search(*haystacks: bytes) -> set[tuple[str, str]]:
    """(field, encoding) of what is found of single sites."""
    return {(n.field, n.encoding) for n in NEEDLES if any(n.data in haystack for haystack in haystacks)}


def files(federation: Any) -> Iterator[bytes]:
    """Everything that any party has on disk, ledgers exported."""
    federation.ledgers()
    for path in sorted(Path(federation.home).iterdir()):
        yield path.read_bytes()


def pages(federation: Any, plan: Any) -> bytes:
    """result.json, and the report's page with all that it can show."""
    store, run = federation.store, federation.run_id
    result, arrays = store.result(run)
    ledgers = {path.stem: path for path in Path(federation.home).glob("*.jsonl")}
    shown = details(plan, store.metrics(run), store.rounds(run), ledgers)
    text = json.dumps([result, shown], default=str) + page(result, shown)
    return text.encode() + b"".join(array.tobytes() for array in arrays.values())


def run(federation: Any, protection: str, **params: Any) -> Any:
    tables = {site: federation.table({"x": [0.5, 0.25]}, COLUMNS) for site in SITES}
    plan = federation.plan("test.canary", params, tables, protection=protection)
    federation.run(plan, tables)
    return plan


def test_plain_shows_every_planted_value(federation: Any) -> None:
    """The search can find what there is: every field of every site is in the wire's bytes."""
    run(federation, "plain")
    wire = [data for _, _, data in federation.wire]
    found = search(*wire)
    assert {name for name, _ in found} == set(FIELDS)
    assert {("narrow", "float64"), ("wide", "float64"), ("small", "integers of 64 bits")} <= found
    for site in SITES:
        theirs = b"".join(data for name, _, data in federation.wire if name == site)
        assert all(
            n.data in theirs for n in NEEDLES if n.site == site and n.encoding == "float64" and n.field == "wide"
        )


def test_plain_leaves_them_with_the_sites_until_they_are_acknowledged(federation: Any) -> None:
    """What is in a journal is found there, too: so that the search of files means something."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Any, progress: Progress) -> Any:
            if message.meta.get("round") == 1:
                kept.append(journals())
            return endpoint(message, progress)

        return handle

    def journals() -> bytes:
        return b"".join(path.read_bytes() for path in Path(federation.home).glob("s*.db"))

    kept: list[bytes] = []
    tables = {site: federation.table({"x": [0.5]}, COLUMNS) for site in SITES}
    federation.run(federation.plan("test.canary", {}, tables, protection="plain"), tables, wrap=wrap, threads=1)
    assert {name for name, _ in search(*kept)} == set(FIELDS)


def test_secagg_shows_none_anywhere(
    federation: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        plan = run(federation, "secagg")
    wire = [data for _, _, data in federation.wire]
    assert len(wire) == 2 * (len(SITES) * (2 + 2 * 4)) and sum(map(len, wire)) > 50_000
    assert search(*wire) == set()
    assert search(*files(federation)) == set()
    shown = pages(federation, plan)
    assert (
        search(shown, str(federation.events).encode(), caplog.text.encode(), "".join(capsys.readouterr()).encode())
        == set()
    )
    total = {name: sum(planted(site)[name] for site in SITES) for name in FIELDS}
    assert str(int(total["small"][0])).encode() in shown  # and the sums are there
    told = federation.store.result(federation.run_id)[0]["output"]["statistics"]
    assert told["large"] == total["large"].tolist()
    assert np.allclose(told["wide"], total["wide"], rtol=0, atol=4e-6)


def test_secagg_shows_none_when_sites_drop_out(federation: Any) -> None:
    """Their secrets are reconstructed, or not; their values are in no message, and not in the survivors' sum alone."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Any, progress: Progress) -> Any:
            if name == "s1" and message.meta.get("round") == 1 and message.meta.get("step") in ("agree", "unmask"):
                raise TransportError("link.lost", "gone", field=name)
            reply = endpoint(message, progress)
            if name == "s1" and message.meta.get("round") == 0 and message.meta.get("step") == "agree":
                raise TransportError("link.lost", "gone, after it signed", field=name)
            return reply

        return handle

    tables = {site: federation.table({"x": [0.5]}, COLUMNS) for site in SITES}
    federation.run(federation.plan("test.canary", {}, tables, protection="secagg"), tables, wrap=wrap)
    assert search(*(data for _, _, data in federation.wire)) == set()
    assert search(*files(federation)) == set()


def test_keys_are_in_no_file_once_the_run_has_ended(tmp_path: Path) -> None:
    """Not in the database, and not in its write-ahead log, where rows stay that were deleted."""
    identity, run = Identity.generate("north"), "0" * 32
    journal = Journal(tmp_path / "north.db", "north", identity.public, identity.sign)
    journal.open_run(run, "running", {})
    session, share = journal.session(run), np.frombuffer(b"a share of another site's secret", np.uint8)
    journal.store_release("task", run, "program", {}, {}, None, protection={"share": share})

    def found() -> set[str]:
        needles = {"session": session.hex().encode(), "share": share.tobytes()}
        files = [path.read_bytes() for path in tmp_path.iterdir()]
        return {name for name, needle in needles.items() if any(needle in file for file in files)}

    assert found() == {"session", "share"}
    journal.end_run(run, "finished", None, "")
    assert found() == set()
    journal.close()


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_errors_and_logs_show_none(federation: Any, caplog: pytest.LogCaptureFixture, protection: str) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(AtollError) as caught:
        run(federation, protection, fails="s2")
    notes = [journal.run(federation.run_id)[2] for journal in federation.journals.values()]
    notes += [federation.store.run(federation.run_id)["note"], repr(caught.value), str(caught.value)]
    assert caught.value.code == "site.internal"
    assert search(caplog.text.encode(), str(notes).encode(), str(federation.events).encode()) == set()


def test_describe_shows_no_sites_own_sums(federation: Any) -> None:
    """An ordinary program: what sites release under plain is looked for under secagg."""
    random = np.random.default_rng(6)
    columns = {"age": {"range": [0, 120]}, "dose": {"range": [0, 5000]}}
    tables = {}
    for site in SITES:
        cells = {"age": random.uniform(1, 99, 57), "dose": random.uniform(100, 4000, 57)}
        tables[site] = federation.table(cells, columns)

    def own(wire: list[tuple[str, str, bytes]]) -> set[bytes]:
        messages = [decode(data) for _, way, data in wire if way == "from"]
        arrays = [a for m in messages if m.kind == "release" for a in m.arrays.values()]
        return {value.tobytes() for a in arrays for value in a.reshape(-1) if a.dtype.kind == "f" and abs(value) > 1e-3}

    federation.run(federation.plan("statistics.describe", {}, tables), tables)
    wanted = {value for value in own(federation.wire) if len(value.strip(b"\0")) >= 6}
    assert len(wanted) > 10
    assert all(any(value in data for _, _, data in federation.wire) for value in wanted)
    federation.run(federation.plan("statistics.describe", {}, tables, protection="secagg"), tables)
    everything = [*(data for _, _, data in federation.wire), *files(federation)]
    assert not [value for value in wanted if any(value in data for data in everything)]
