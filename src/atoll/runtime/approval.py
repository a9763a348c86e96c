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
        if roster_right and study_right:
            journal.advance(run, "pending", "approved")
        elif time.monotonic() - told > 1:
            progress({"waiting": "approval of the study" if roster_right else "approval of the roster"})
            told = time.monotonic()
        else:
            time.sleep(0.1)
