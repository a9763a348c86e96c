"""Approval: a run begins at a site when its policy, or its operator, says yes to roster and study."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from atoll.contract.errors import PolicyError
from atoll.contract.wire import Json
from atoll.runtime.journal import Journal, not_running
from atoll.runtime.policy import Policy, audited

Progress = Callable[[Mapping[str, Json]], None]
STANDING = "standing"
"""Under this name a journal keeps which plans are approved for good."""


def await_approval(
    journal: Journal, policy: Policy, name: str, run: str, roster: Mapping[str, str], progress: Progress
) -> None:
    """Return once roster and study are approved; raises PolicyError when denied, or when the policy demands an audit
    that was not made, ProtocolError when closed."""
    _, opened, _ = journal.run(run) or ("", {}, "")
    if journal.status(run) == "pending":
        policy.check_audit(opened["plan"]["program"], journal.setting(audited(opened["hash"])))
    told = -1.0
    while True:
        status = journal.status(run)
        if status in ("approved", "running"):
            return
        if status == "denied":
            raise PolicyError(
                "policy.denied", "the site's operator did not approve the study", field="approval",
                remedy="talk to the site's operator",
            )  # fmt: skip
        if status != "pending":
            raise not_running(status)
        known = {**json.loads(journal.setting("roster") or "{}"), name: roster[name]}
        roster_right = policy.roster == "automatic" or all(known.get(s) == k for s, k in roster.items())
        study_right = policy.approval == "automatic" or journal.setting(f"approved {run}") == "yes"
        study_right = study_right or opened["hash"] in standing(journal)
        if roster_right and study_right:
            journal.advance(run, "pending", "approved")
        elif time.monotonic() - told > 1:
            progress({"waiting": "approval of the study" if roster_right else "approval of the roster"})
            told = time.monotonic()
        else:
            time.sleep(0.1)


def standing(journal: Journal) -> dict[str, str]:
    """Plans of which every run is approved until that is withdrawn: their names by their hashes."""
    found: dict[str, str] = json.loads(journal.setting(STANDING) or "{}")
    return found


def stand(journal: Journal, plan_hash: str, name: str | None) -> None:
    """From now on every run of the plan *name* with this hash is approved; None: no longer."""
    now = {known: called for known, called in standing(journal).items() if known != plan_hash}
    journal.set_setting(STANDING, json.dumps(now if name is None else {**now, plan_hash: name}))
