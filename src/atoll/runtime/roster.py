"""The roster: which identities take part in a run. Its hash is in every release's signature."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.wire import Json, canonical_json
from atoll.crypto.pki import check_name


def roster_hash(roster: Mapping[str, str]) -> str:
    """The identity of a set of identities: SHA-256 over {site: public key (hex)}."""
    return hashlib.sha256(b"atoll roster 1\0" + canonical_json(dict(roster))).hexdigest()


def agreement(plan: str, roster: str) -> str:
    """What the parties of a run agree on for all of it: SHA-256 over the hashes of its *plan* and *roster*. Keys and
    signatures among them are for this and nothing else, so no site's reply goes into a sum with another plan's."""
    return hashlib.sha256(b"atoll agreement 1\0" + canonical_json([plan, roster])).hexdigest()


def read_roster(announced: Json, sites: Sequence[str]) -> dict[str, str]:
    """The announced public keys (hex) by site; raises ProtocolError for anything else, and where they are not those of
    the plan's *sites*, if it names any."""
    if not isinstance(announced, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(k)) for k in announced.values()):
        raise ProtocolError("roster.malformed", "the announced roster is not one of sites and keys", field="roster")
    if sites and announced.keys() != set(sites):
        raise ProtocolError(
            "roster.other-sites", "the announced roster is not that of the sites that the plan names", field="roster",
            remedy="the coordinator does not keep the plan: do not go on with it",
        )  # fmt: skip
    return {check_name(str(site)): str(key) for site, key in announced.items()}


def among(plan: Plan, sites: Collection[str]) -> Plan:
    """*plan* as a sandbox runs it: among its own *sites*, where the plan names others."""
    if not plan.cohort.sites or set(plan.cohort.sites) == set(sites):
        return plan
    return plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"sites": ()})})


def check_cohort(plan: Plan, sites: Sequence[str], roster: Mapping[str, str]) -> None:
    """Raise PlanError when a site is not enrolled, or there are fewer than the plan demands."""
    if missing := [site for site in sites if site not in roster]:
        raise PlanError(
            "cohort.not-enrolled", "the plan names sites that are not enrolled", field=", ".join(missing),
            remedy="enrol them, or remove them from cohort.sites",
        )  # fmt: skip
    if len(sites) < plan.cohort.min_sites:
        raise PlanError(
            "cohort.too-small", f"the plan demands {plan.cohort.min_sites} sites, and {len(sites)} are there",
            field="cohort.min_sites", remedy="enrol more sites, or lower min_sites",
        )  # fmt: skip
