"""The egress gate: the only door out of a site.

    check → clip → noise → protect → charge and journal → message

A handler's reply becomes a release only here: it has exactly the declared fields,
dtypes and shapes, no NaN or infinity, no group of people smaller than the policy
allows, nothing beyond its declared bound. Its ledger entry is written durably first.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atoll.contract.disclosure import Rule, check_groups, judged
from atoll.contract.errors import PolicyError
from atoll.contract.fields import Field, as_arrays, clip
from atoll.contract.program import Handler
from atoll.contract.protection import REPLY, Protection
from atoll.contract.rounds import TaskId
from atoll.contract.wire import Array, Json, Message, body_parts, canonical_json
from atoll.crypto.prg import Stream
from atoll.privacy.dp.release import Noise
from atoll.runtime.budget import Charge
from atoll.runtime.journal import Journal, Receipt
from atoll.runtime.party import Own
from atoll.runtime.policy import Policy

log = logging.getLogger("atoll.site")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, as far as the gate and the ledger care. fields: what the reply must be, and within which bounds.
    question: the digest of what was sent. room: the fields for the protection, where some replies of the cohort stand
    for several sites. members: of how many sites a region's reply is the sum."""

    task: TaskId
    program: str
    name: str
    handler: Handler
    fields: Mapping[str, Field]
    plan: str
    roster: str
    question: str = ""
    room: Mapping[str, Field] | None = None
    members: int | None = None


@dataclass(frozen=True, slots=True)
class Noised:
    """The noise for one release: the fields with room for it, its scale for each, and secret randomness by field."""

    noise: Noise
    fields: Mapping[str, Field]
    scales: Mapping[str, float]
    random: Callable[[str], Stream]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a release costs, and its noise, if any. charge: None for one without any value."""

    charge: Charge | None
    noised: Noised | None = None


def body_digest(specs: Json, body_sha256: bytes) -> str:
    """What a release entry commits to: names, dtypes and shapes, and the SHA-256 of the buffers (hex)."""
    return hashlib.sha256(b"atoll release 1\0" + canonical_json(specs) + body_sha256).hexdigest()


def _sha256(parts: Iterable[memoryview | bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


class EgressGate:
    """One per site. Holds the policy and the journal; nothing else may send."""

    def __init__(self, policy: Policy, journal: Journal) -> None:
        self._policy, self._journal = policy, journal

    def release(
        self,
        asked: Request,
        reply: Mapping[str, Any],
        protection: Protection,
        party: Own,
        cost: Cost,
        state: Mapping[str, Array] | None,
        receipts: Sequence[Receipt] = (),
    ) -> Message:
        """The release message for a handler's *reply*, durably recorded together with the program's *state*,
        that of its protection, what it costs, and the coordinator's *receipts* for earlier releases.

        Raises ProtocolError (fields, shape, NaN), DisclosureError (small group), PolicyError
        (size) or IntegrityError (journal cannot be written); in each case nothing leaves.
        """
        noised = cost.noised
        shown = protection.reveals and noised is None
        told = judged(reply, asked.handler.cells, self._policy.rule() if shown else Rule())
        arrays = as_arrays(told, asked.fields)
        for name, declared in asked.fields.items():
            declared.check_finite(name, arrays[name], undefined=asked.handler.reduce == "gather")
        if shown:  # else the coordinator half checks the cohort's total
            check_groups(arrays, asked.handler.groups, self._policy.min_group_size)
        arrays, clipped = clip(arrays, asked.fields)
        fields, charge = asked.room or asked.fields, cost.charge
        if noised is not None and charge is not None:
            # another attempt at the round has the same noise: it must have the same answer under it
            charge = replace(charge, question=f"{charge.question} {_sha256(body_parts(arrays)[1]).hex()}")
            arrays = noised.noise.add(asked.task.round, arrays, noised.fields, noised.scales, noised.random)
            fields = noised.fields
            arrays, _ = clip(arrays, fields)
        if asked.handler.reduce == "sum":  # a single reply is shown as it is
            arrays = protection.answer(REPLY, party, arrays, fields)
        party.replied()
        if clipped and not shown:  # how many is the site's own secret then
            log.warning("%s: %d values beyond their bounds were clipped in %s", party.name, clipped, asked.task)
        told_clipped = clipped if shown else None
        return self._send(asked, arrays, protection, party, state, receipts, told_clipped, charge)

    def relay(self, asked: Request, protection: Protection, party: Own, receipts: Sequence[Receipt] = ()) -> Message:
        """The release message of a protection's own exchange: keys, shares, signatures, and no reply."""
        arrays = protection.answer(asked.task.step, party, {}, asked.room or asked.fields)
        return self._send(asked, arrays, protection, party, None, receipts, None, None)

    def _send(
        self, asked: Request, arrays: dict[str, Array], protection: Protection, party: Own,
        state: Mapping[str, Array] | None, receipts: Sequence[Receipt], clipped: int | None,
        charge: Charge | None,
    ) -> Message:  # fmt: skip
        specs, parts = body_parts(arrays)
        digest = _sha256(parts)
        size_bytes = sum(len(part) for part in parts)
        if size_bytes > self._policy.max_message_bytes:
            raise too_large()
        body = {
            **asked.task.to_json(),
            "program": asked.program,
            "handler": asked.name,
            "reduce": asked.handler.reduce,
            "protection": protection.name,
            "plan": asked.plan,
            "roster": asked.roster,
            "question": asked.question,
            "fields": specs,
            "bytes": size_bytes,
            "clipped": clipped,
            "epsilon": charge.epsilon if charge and math.isfinite(charge.epsilon) else None,
            "digest": body_digest(specs, digest),
            **({} if asked.members is None else {"members": asked.members}),
        }
        task = asked.task
        kept = None if protection.reveals else party.state
        return self._journal.store_release(
            str(task), task.run, asked.program, body, arrays, state, receipts, party.query, kept, charge, party.personal
        )


def too_large() -> PolicyError:
    """The one error for a release beyond the policy's max_message_bytes."""
    return PolicyError(
        "policy.too-large", "the release is larger than the policy allows", field="max_message_bytes",
        remedy="the site's operator decides: policy.yaml, 'max_message_bytes'",
    )  # fmt: skip
