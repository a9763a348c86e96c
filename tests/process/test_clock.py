"""A clock that jumps: by hours, or by weeks, forwards and backwards, at each party another, while a run goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HOURS = 3600.0
WEEKS = 40 * 24
"""Hours by which a clock is beyond every certificate."""
HOOK = '''
"""The wall clock of this process is shifted by what a file of its party says, in seconds; others are left alone."""
import datetime
import os
import sys
import time
from pathlib import Path

FOLDER, PARTY = Path(os.environ["ATOLL_TEST_FOLDER"]), Path(sys.orig_argv[-1]).name
real_time = time.time


def shift():
    try:
        return float((FOLDER / f"{PARTY}.clock").read_text())
    except (OSError, ValueError):
        return 0.0


class Shifted:
    def __getattr__(self, name):
        return getattr(datetime.datetime, name)

    def now(self, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(seconds=shift())


class Clock:
    datetime = Shifted()

    def __getattr__(self, name):
        return getattr(datetime, name)


if "up" in sys.orig_argv:
    from atoll.crypto import pki
    from atoll.ledger import entry
    from atoll.runtime import journal, results, store

    time.time = lambda: real_time() + shift()
    for module in (pki, entry, journal, results, store):
        assert module.dt is datetime
        module.dt = Clock()
'''


@pytest.fixture(scope="module")
def jumpy(wait_until: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(a federation of this module's own, what sets a party's clock)."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    conftest: Any = sys.modules[wait_until.__module__]

    def jump(**hours: float) -> None:
        for party, by in hours.items():
            fresh = folder / f"{party}.clock.new"
            fresh.write_text(str(by * HOURS))
            fresh.replace(folder / f"{party}.clock")  # whole, as the party reads it meanwhile

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.ENVIRONMENT, "PYTHONPATH", str(folder))
        patch.setitem(conftest.ENVIRONMENT, "ATOLL_TEST_FOLDER", str(folder))
        federation = conftest.Federation(tmp_path_factory.mktemp("clock") / "f")
        try:
            yield federation.set_up(), jump
        finally:
            federation.stop()


def times(ledger: list[dict[str, Any]]) -> list[str]:
    return [entry["time"] for entry in ledger]


@pytest.mark.parametrize("protection", ["plain"])
def test_a_run_goes_on_whatever_the_clocks_do(jumpy: Any, protection: str) -> None:
    """No deadline passes, nobody drops out, and every ledger still verifies."""
    federation, jump = jumpy
    calm = federation.submit("calm", params={"rounds": 200}, protection=protection)
    federation.await_status(calm, "finished")
    run = federation.submit("jumpy", params={"rounds": 200}, protection=protection)
    federation.await_rounds(run, 20)
    jump(coordinator=5, alpha=-7, beta=30)
    federation.await_rounds(run, 50)
    jump(coordinator=-6, alpha=26, beta=-48, gamma=2)
    federation.await_rounds(run, 80)
    jump(coordinator=0, alpha=0, beta=0, gamma=0)
    row = federation.await_status(run, "finished")
    assert not row["note"]
    one, other = federation.store.result(calm), federation.store.result(run)
    assert {n: a.tobytes() for n, a in one[1].items()} == {n: a.tobytes() for n, a in other[1].items()}
    ledgers = federation.ledgers()
    federation.check_once(run, 202, ledgers)
    assert times(ledgers["alpha"]) != sorted(times(ledgers["alpha"])), "the clock did jump"


def test_a_party_that_starts_with_a_wrong_clock_still_takes_part(jumpy: Any) -> None:
    federation, jump = jumpy
    jump(coordinator=-9, beta=11)
    federation.sites["beta"].kill()
    federation.sites["beta"].start()
    federation.await_connected()
    run = federation.submit("wrong", params={"rounds": 20})
    federation.await_status(run, "finished")
    jump(coordinator=0, beta=0)


def told(party: Any) -> str:
    """What it printed since it was started, on one line."""
    return " ".join(party.text().split())


def test_clocks_that_are_weeks_off_are_told_and_hold_no_run_up(jumpy: Any, wait_until: Any) -> None:
    """A site goes by the coordinator's clock, which it was told when it connected; its own is only told of."""
    federation, jump = jumpy
    run = federation.submit("weeks", params={"rounds": 100_000})
    federation.await_rounds(run, 5)
    jump(alpha=WEEKS, beta=-WEEKS, coordinator=WEEKS)
    alpha, beta = federation.sites["alpha"], federation.sites["beta"]
    wait_until(lambda: "alpha: this site's clock is 40 days ahead of the coordinator's" in told(alpha), "its warning")
    wait_until(lambda: "beta: this site's clock is 40 days behind the coordinator's" in told(beta), "its warning")
    seen = federation.rounds(run)
    federation.await_rounds(run, seen + 50)
    assert not federation.row(run)["note"] and "disconnected" not in told(alpha) + told(beta)
    federation.as_coordinator("cancel", run)
    federation.await_status(run, "cancelled")


def test_who_starts_with_a_clock_that_is_weeks_off_is_told_so_at_once(jumpy: Any) -> None:
    federation, jump = jumpy
    alpha = federation.sites["alpha"]
    alpha.kill()
    jump(alpha=WEEKS, beta=0, coordinator=0)
    alpha.start()
    assert alpha.wait() == 1 and "by this site's clock, " in told(alpha) and "set the clock right" in told(alpha)
    jump(alpha=0, coordinator=WEEKS)
    alpha.start()
    assert alpha.wait() == 1 and "the coordinator's certificate is not valid yet" in told(alpha)
    jump(coordinator=0)  # it is not started anew
    alpha.start()
    federation.await_connected("alpha")


def test_a_clock_that_went_forward_and_back_gives_no_budget_twice(jumpy: Any) -> None:
    """What was spent on a day to come still counts when that day is to come again."""
    federation, jump = jumpy

    def left() -> tuple[float, int]:
        [line] = json.loads(federation.as_site("alpha", "budget", "--json").stdout)
        return float(line["epsilon"]), int(line["exact"])

    before = left()
    jump(alpha=26)
    run = federation.submit("ahead", params={"rounds": 5})
    federation.await_status(run, "finished")
    jump(alpha=0)
    assert left()[1] == before[1] + 7
