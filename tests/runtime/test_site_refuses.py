"""What a coordinator that does not keep the protocol cannot make a site do, in the middle of an approved run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.program import build
from atoll.contract.wire import Message
from atoll.crypto.identity import Identity, verify
from atoll.ledger.verify import verify_file
from atoll.runtime.journal import Journal
from atoll.runtime.study import Permitted

COLUMNS = {"x": {"range": [0, 10]}, "y": {"range": [0, 10]}}
PARAMS = {"family": "linear", "target": "y", "features": ["x"], "rounds": 2}


class Tempter:
    """Stands before site s0 and asks, at its first task, for *tried* before the real thing."""

    def __init__(self, tried: Any, *, after: bool = False) -> None:
        self.tried, self.after, self.answers = tried, after, list[Message]()

    def __call__(self, name: str, endpoint: Any) -> Any:
        def tempted(message: Message, progress: Any) -> Message:
            first = name == "s0" and message.kind == "task" and not self.answers
            if first and not self.after:
                self.answers.append(endpoint(self.tried(message), progress))
            reply = endpoint(message, progress)
            if first and self.after:
                self.answers.append(endpoint(self.tried(message), progress))
            return reply

        return tempted


def changed(**meta: Any) -> Any:
    return lambda message: replace(message, meta={**message.meta, **meta})


def widened(message: Message) -> Message:
    rows = 12
    weights = np.repeat(np.asarray(message.arrays["weights"])[:, None], rows, axis=1)
    return replace(message, arrays={"weights": weights})


def closed(status: str) -> Any:
    def ask(message: Message) -> Message:
        meta = {"id": "c", "run": message.meta["run"], "status": status, "error": None, "receipts": []}
        return Message("close", meta)

    return ask


DESCRIBE = {"columns": ["x"], "bins": 12, "tail_rows": 1}
TEMPTATIONS = {
    "another program": (changed(program="statistics.describe", name="moments", params=DESCRIBE), "policy.not-in-plan"),
    "other parameters": (changed(params={**PARAMS, "learning_rate": 0.5}), "policy.not-in-plan"),
    "another reduction": (changed(reduce="gather"), "task.reduction"),
    "another site's task": (changed(site="s1"), "task.misdirected"),
    "another run": (changed(run="0" * 32), "run.not-open"),
    "weights for each row": (widened, "task.array"),
    "no weights": (lambda message: replace(message, arrays={}), "task.array"),
    **{
        f"an end that is none: {status}": (closed(status), "run.no-end")
        for status in ("running", "approved", "", "denied")
    },
}


@pytest.mark.parametrize("what", TEMPTATIONS)
def test_a_site_is_not_tempted(federation: Any, what: str) -> None:
    tried, code = TEMPTATIONS[what]
    tempter = Tempter(tried)
    outcome = run(federation, tempter)
    (answer,) = tempter.answers
    assert (answer.kind, answer.meta["code"], answer.arrays) == ("failure", code, {})
    assert outcome["result"]["iterations"] == 2
    releases = [entry for entry in ledger_of(federation, "s0") if entry["kind"] == "release"]
    assert [entry["body"]["handler"] for entry in releases] == ["train", "train"]


def test_a_release_is_not_sent_for_another_question(federation: Any) -> None:
    tempter = Tempter(lambda message: replace(message, arrays={"weights": message.arrays["weights"] + 1}), after=True)
    run(federation, tempter)
    assert tempter.answers[0].meta["code"] == "task.changed"


def test_the_same_question_gets_the_same_release(federation: Any) -> None:
    tempter = Tempter(lambda message: message, after=True)
    run(federation, tempter)
    assert tempter.answers[0].kind == "release"
    releases = [entry for entry in ledger_of(federation, "s0") if entry["kind"] == "release"]
    assert len(releases) == 2 and len({entry["body"]["question"] for entry in releases}) == 2


def run(federation: Any, tempter: Tempter) -> Any:
    x = np.linspace(1, 9, 12)
    tables = {site: federation.table({"x": x, "y": x / 2}, COLUMNS) for site in ("s0", "s1")}
    federation.build(tables, wrap=tempter)
    federation.submit(federation.plan("horizontal.fedavg", PARAMS, tables))
    return federation.drive()


def ledger_of(federation: Any, site: str) -> list[Any]:
    path = federation.folder / f"{site}.jsonl"
    federation.journals[site].export(path)
    return verify_file(path, verify).entries


def test_what_a_program_calls_is_answered_with_its_own_parameters_only(federation: Any) -> None:
    """An approver of VIF on x and z does not approve correlations of whatever else."""
    columns = {name: {"range": [0, 1]} for name in ("x", "z", "secret")}
    random = np.random.default_rng(1)
    tables = {"a": federation.table({name: random.random(50) for name in columns}, columns)}
    plan = federation.plan("statistics.vif", {"columns": ["x", "z"]}, tables)
    permitted = Permitted(plan)
    asked = {"columns": ["x", "z"], "missing": "listwise"}
    permitted.check(build("statistics.correlation", asked))
    for other in ({**asked, "columns": ["x", "secret"]}, {"columns": ["x", "z"]}):
        with pytest.raises(PolicyError) as caught:
            permitted.check(build("statistics.correlation", other))
        assert caught.value.code == "policy.not-in-plan"
    federation.run(plan, tables)


def test_what_was_fitted_stays_the_same_in_a_run(tmp_path: Path) -> None:
    identity = Identity.generate("a")
    journal = Journal(tmp_path / "j.db", "a", identity.public, identity.sign)
    journal.pin_view("r", {"0": {"x": 3.0}})
    journal.pin_view("r", {"0": {"x": 3.0}, "1": [1, 2]})
    journal.pin_view("other", {"0": {"x": 4.0}})
    with pytest.raises(ProtocolError) as caught:
        journal.pin_view("r", {"0": {"x": 3.0001}})
    assert caught.value.code == "task.view"
    journal.close()
