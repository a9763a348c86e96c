"""Releases verified, and acknowledged: the coordinator's signature on what it received.

A round's releases are acknowledged by one signed "received" entry in the coordinator's
ledger, over the Merkle root of the sites' release entries; each site is sent the entry
with its own path (its receipt) with its next task, or when the run is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from atoll.contract.errors import IntegrityError, ProtocolError
from atoll.contract.protection import REPLY
from atoll.contract.rounds import Arrival, Gather, Gathered, Reduced, Round, Sum, Summed
from atoll.contract.wire import Array, Json, Message
from atoll.crypto.identity import verify
from atoll.ledger import merkle
from atoll.ledger.entry import Chain, Entry, is_release, leaf, verify_entry
from atoll.runtime.egress import body_digest
from atoll.transport.spool import Incoming

Grouping = Literal["round", "each"]


def verify_release(incoming: Incoming, task: Message, public: bytes, plan: str, roster: str) -> None:
    """Raise IntegrityError unless the release is the site's own, for this task of this study,
    and its bytes are those that its signed ledger entry commits to."""
    meta, entry = task.meta, incoming.meta.get("entry")
    right = False
    if isinstance(entry, dict) and is_release(entry):
        verify_entry(entry, public, verify)
        specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in incoming.head.specs]
        wanted = {name: meta[name] for name in ("run", "round", "attempt", "step", "site", "program")}
        wanted |= {"handler": meta["name"], "plan": plan, "roster": roster}
        wanted["digest"] = body_digest(specs, incoming.body_sha256)
        right = entry["party"] == meta["site"] and all(entry["body"].get(k) == v for k, v in wanted.items())
    if not right:
        raise IntegrityError(
            "release.wrong", "a release is not what its signature covers", remedy="compare both parties' ledgers"
        )


def acknowledge(
    chain: Chain, about: Mapping[str, Json], replies: Mapping[str, Sequence[Incoming]], grouping: Grouping
) -> tuple[list[Entry], dict[str, list[Json]]]:
    """(ledger entries to be stored, receipts by site) for a round's releases; moves the chain's head.

    grouping: one signature for the round, or one for each release.
    """
    leaves = [
        {"site": site, "seq": incoming.meta["entry"]["seq"], "hash": incoming.meta["entry"]["hash"]}
        for site, incomings in replies.items()
        for incoming in incomings
    ]
    groups = [[item] for item in leaves] if grouping == "each" else [leaves] if leaves else []
    entries: list[Entry] = []
    receipts: dict[str, list[Json]] = {}
    for group in groups:
        tree = merkle.levels([leaf(item["site"], item["seq"], item["hash"]) for item in group])
        body = {**about, "root": tree[-1][0].hex(), "count": len(group)}
        entry = chain.next("received", body, group)
        chain.commit(entry)
        entries.append(entry)
        shown = {name: value for name, value in entry.items() if name != "leaves"}
        for index, item in enumerate(group):
            receipt = {"of": item["seq"], "entry": shown, "path": merkle.path(tree, index)}
            receipts.setdefault(str(item["site"]), []).append(receipt)
    return entries, receipts


def members_of(released: Sequence[Incoming], most: int) -> int:
    """Of how many sites the reply among one name's releases in a round is; raises ProtocolError above *most*."""
    bodies = [incoming.meta["entry"]["body"] for incoming in released]
    told = next((body.get("members", 1) for body in bodies if body["step"] == REPLY), 1)
    if type(told) is not int or not 0 < told <= most:
        raise ProtocolError("release.members", "a reply is of more sites than the plan says", field="cohort.members")
    return told


# ---------------------------------------------------------------- reductions, as they are stored


def pack(result: Reduced, asked: Round, question: str = "") -> Message:
    """A reduction as the run store keeps it. question: the digest of what was asked, where somebody else asked it."""
    meta: dict[str, Json] = {"asked": f"{asked.program}/{asked.name}", "question": question}
    if isinstance(result, Summed):
        of: dict[str, Json] = {"sites": list(result.sites), "behind": result.behind}
        cohort = None if result.cohort is None else list(result.cohort)
        return Message("reduced", {**meta, **of, "cohort": cohort}, result.arrays)
    if isinstance(result, Gathered):
        arrays = {f"{i}/{n}": v for i, s in enumerate(result.sites) for n, v in result.replies[s].items()}
        return Message("reduced", {**meta, "sites": list(result.sites), "broken": dict(result.broken)}, arrays)
    return Message("reduced", {**meta, "sites": [result.site], "asked_round": result.asked_round}, result.values)


def unpack(stored: Message, asked: Round) -> Reduced:
    """Inverse of :func:`pack`; raises IntegrityError when *asked* is not the round that was stored."""
    if stored.meta["asked"] != f"{asked.program}/{asked.name}":
        raise IntegrityError(
            "resume.differs",
            "the program asks for other rounds than the stored ones",
            field=asked.program,
            remedy="resume with the program version that began the run",
        )
    sites = tuple(str(site) for site in stored.meta["sites"])
    if isinstance(asked.reduce, Sum):
        cohort = stored.meta.get("cohort")
        among = None if cohort is None else tuple(map(str, cohort))
        return Summed(stored.arrays, sites, int(stored.meta.get("behind", 0)), among)
    if isinstance(asked.reduce, Gather):
        replies: dict[str, dict[str, Array]] = {site: {} for site in sites}
        for key, value in stored.arrays.items():
            index, name = key.split("/", 1)
            replies[sites[int(index)]][name] = value
        return Gathered(replies, dict(stored.meta.get("broken", {})))
    return Arrival(sites[0], int(stored.meta["asked_round"]), stored.arrays)
