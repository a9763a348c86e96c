"""How large a run's messages are, by what is in them, without sending any: the header of each is really made.

Names, digests, signatures and numbers are stood in for by others of the same length, so that sizes are exact to a few
bytes for ``plain``; what a protection adds to a Sum is as its ``estimate`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from atoll.contract.plan import Plan
from atoll.contract.protection import REPLY, find
from atoll.contract.rounds import Round, Sum
from atoll.contract.wire import PREFIX, Json, padded, to_json
from atoll.runtime.courier import cohort_of, described

DIGEST, SIGNATURE, KEY = "0" * 64, "0" * 128, "0" * 64
SESSION = "0" * 192
TIME = "2025-01-01T00:00:00.000000+00:00"
RUN = "0" * 32


@dataclass(frozen=True, slots=True)
class Load:
    """One request to one site. down_bytes, up_bytes: to it and back, all of its exchanges. trips: how many these are.
    seconds: of computing that is the protection's own."""

    down_bytes: int
    up_bytes: int
    trips: int = 1
    seconds: float = 0.0


class Sizes:
    """The messages of one run over *num_sites* sites."""

    def __init__(self, plan: Plan, sites: tuple[str, ...]) -> None:
        self._plan, self._sites = plan, sites
        self._name = max(sites, key=len, default="")

    def load(self, asked: Round, number: int) -> Load:
        """A task of round *number*, and its release."""
        down, up = self._task(asked, number), self._release(asked, number)
        protection, body = find(self._plan.protection.sum), sum(padded(f.size_bytes) for f in asked.reply.values())
        if not isinstance(asked.reduce, Sum) or protection.reveals:
            return Load(down, up)
        among = len(asked.sites) if asked.among and asked.sites is not None else len(self._sites)
        one = protection.estimate(asked.reply, among, self._plan.protection)
        exchanges, keys = one.trips - 1, max(one.bytes - body, 0)
        down += exchanges * (down - _body(asked.send)) + keys * 2 // 3  # what each neighbour sent up comes down signed
        up += exchanges * (up - body) + keys // 3 + min(one.bytes - body, 0)
        return Load(down, up, one.trips, one.seconds)

    @cached_property
    def opening(self) -> Load:
        """The announcement, and its answer."""
        meta = {"id": f"{RUN}/open/{self._name}", "run": RUN, "plan": self._plan.to_json()}
        roster = dict.fromkeys(self._sites, KEY)
        answer = {"re": meta["id"], "rows": 100, "session": SESSION}
        return Load(_head("open", {**meta, "roster": roster}, []), _head("opened", answer, []))

    def _task(self, asked: Round, number: int) -> int:
        extra = asked.send_to.get(self._name) or next(iter(asked.send_to.values()), {})
        own = {name: np.asarray(value) for name, value in {**asked.send, **extra}.items()}
        meta = {
            "id": f"{RUN}/{number}/0/{REPLY}/{self._name}",
            "run": RUN, "round": number, "attempt": 0, "step": REPLY, "site": self._name,
            **described(asked), "question": "", "cohort": cohort_of(asked),
            "receipts": [self._receipt(asked.program, asked.name, number)] if number else [],
        }  # fmt: skip
        return _head("task", meta, _specs(own)) + _body(own)

    def _release(self, asked: Round, number: int) -> int:
        specs = [[name, field.dtype, [n or 0 for n in field.shape]] for name, field in asked.reply.items()]
        size = sum(padded(field.size_bytes) for field in asked.reply.values())
        body = {
            "run": RUN, "round": number, "attempt": 0, "step": REPLY, "site": self._name, "program": asked.program,
            "handler": asked.name, "reduce": asked.reduce.tag,
            "protection": self._plan.protection.sum if isinstance(asked.reduce, Sum) else "plain",
            "plan": DIGEST, "roster": DIGEST, "question": DIGEST, "fields": specs, "bytes": size, "clipped": 0,
            "epsilon": None, "digest": DIGEST,
        }  # fmt: skip
        entry = self._entry("release", 3 * number, self._name, body)
        return _head("release", {"re": f"{RUN}/{number}/0/{REPLY}/{self._name}", "entry": entry}, specs) + size

    def _receipt(self, program: str, name: str, number: int) -> Json:
        body = {"run": RUN, "round": number, "program": program, "handler": name, "root": DIGEST, "count": 100}
        whole, part = divmod(_siblings(len(self._sites)), 1)
        step = ["right", DIGEST]
        path = [step] * int(whole) + [["", DIGEST[: max(0, round(part * len(to_json(step))) - 6)]]]
        return {"of": 3 * number, "entry": self._entry("received", number, "coordinator", body), "path": path}

    @staticmethod
    def _entry(kind: str, seq: int, party: str, body: Json) -> Json:
        signed = {"prev": DIGEST, "hash": DIGEST, "sig": SIGNATURE}
        return {"v": 1, "seq": seq, "time": TIME, "party": party, "kind": kind, "body": body, **signed}


def _head(kind: str, meta: Mapping[str, Any], specs: Json) -> int:
    return padded(PREFIX.size + len(to_json({"kind": kind, "meta": dict(meta), "arrays": specs})))


def _specs(arrays: Mapping[str, Any]) -> Json:
    return [[name, np.asarray(value).dtype.str, list(np.shape(value))] for name, value in arrays.items()]


def _body(arrays: Mapping[str, Any]) -> int:
    return sum(padded(np.asarray(value).nbytes) for value in arrays.values())


def _siblings(leaves: int) -> float:
    """How long the path of a leaf of a Merkle tree is on average: the last node of a row may have no sibling."""
    found, nodes, each = 0.0, leaves, 1
    while nodes > 1:
        found += 1 - (leaves - (nodes - 1) * each if nodes % 2 else 0) / leaves
        nodes, each = -(-nodes // 2), 2 * each
    return found
