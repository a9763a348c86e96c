"""What all parties of a growing model hold alike, and how sites are brought to it.

It is a log of records, each a vector of reals: first the bins' edges and the base margins, then, for every tree in
turn, what its open nodes became, level by level (see :class:`Grown`). A site's log only grows: what it once took it
does not take back, so that edges and earlier splits cannot be changed in mid-run, and what it is asked at a level is
about the one tree that the log tells. A record's digest covers all before it; the last one is part of what all sites
are asked, and a site answers only with the log that has it.

Every round sends the records since the round before to all sites; a site that missed rounds is sent those that it
lacks, too, so it catches up with the next answer. The log is kept in the site's state, so that a restarted process
finds it.

What sites learn: the edges, and the model as it grows. Cost: 40 bytes for each node, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import APART, Task, not_taken
from atoll.contract.wire import Array

Floats = NDArray[np.float64]
Sent = tuple[dict[str, Array], dict[str, dict[str, Array]]]
"""(what all sites are sent, what single ones are)."""
NOTHING = hashlib.sha256(b"atoll trees 1\0").digest()


class Log:
    """Records, and the digest after each of them; *digests* has one more, of no records."""

    def __init__(self, records: Iterable[Floats] = ()) -> None:
        self.records: list[Floats] = []
        self.digests = [NOTHING]
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self.records)

    def add(self, record: Floats) -> None:
        """Append one."""
        record = np.ascontiguousarray(record, "<f8").reshape(-1)
        size = len(record).to_bytes(8, "little")
        self.records.append(record)
        self.digests.append(hashlib.sha256(self.digests[-1] + size + record.tobytes()).digest())

    def arrays(self) -> dict[str, Array]:
        """For a state or a checkpoint."""
        return {**_packed(self.records), "digest": np.frombuffer(self.digests[-1], np.uint8)}

    def until(self, size: int) -> Log:
        """Its first records."""
        found = Log()
        found.records, found.digests = self.records[:size], self.digests[: size + 1]
        return found

    @staticmethod
    def of(state: Mapping[str, Array], known: Log | None = None) -> Log:
        """As :meth:`arrays` was made; empty where there is nothing. known: one that may begin with the same records, so
        that they need not be hashed again."""
        size = len(state.get("sizes", ()))
        last = state["digest"].tobytes() if "digest" in state else b""
        if known is not None and size <= len(known) and known.digests[size] == last:
            return known.until(size)
        return Log(_unpacked(state) or () if "records" in state else ())


class Replica:
    """The coordinator's side: the log, and how much of it each site has."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.log, self.has, self.asked = Log(), dict.fromkeys(sites, 0), 0

    def add(self, record: Floats) -> None:
        """What all are to know with the next round."""
        self.log.add(record)

    def sent(self) -> Sent:
        """What brings every site to the log; all of them are to be asked with it now."""
        before, after = self.asked, len(self.log)
        version = np.array([before, after], np.int64)
        digest = np.frombuffer(self.log.digests[-1], np.uint8)
        told: dict[str, Array] = {"version": version, "digest": digest, **_packed(self.log.records[before:])}
        lacks = {
            site: {APART + name: array for name, array in _packed(self.log.records[has:before]).items()}
            for site, has in self.has.items()
            if has < before
        }
        self.asked = after
        return told, lacks

    def answered(self, sites: Iterable[str]) -> None:
        """These have it."""
        self.has |= {site: self.asked for site in sites if site in self.has}

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {
            **self.log.arrays(), "asked": np.array(self.asked), "has": np.array(list(self.has.values()), np.int64),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Array]) -> None:
        """As :meth:`arrays` was made."""
        self.log, self.asked = Log.of(state), int(state["asked"])
        self.has = dict(zip(self.has, state["has"].tolist(), strict=True))


def received(task: Task, state: Mapping[str, Array], known: Log | None = None) -> Log:
    """The site's side: its log of *state*, brought to the digest that all are asked with; to be kept there when what it
    says is found to be sound. known: what this process remembers of it.

    Raises ProtocolError where what it was sent does not continue what it has.
    """
    version, digest = task.arrays.get("version"), task.arrays.get("digest")
    whole = version is not None and version.dtype == np.int64 and version.shape == (2,)
    if version is None or not whole or digest is None or digest.dtype != np.uint8 or digest.shape != (32,):
        raise not_taken("version")
    before, after = int(version[0]), int(version[1])
    new, log = _unpacked(task.arrays), Log.of(state, known)
    if new is None or not 0 <= before <= after or len(new) != after - before or len(log) > after:
        raise not_taken("records")
    lacked: list[Floats] = []
    if len(log) < before:
        earlier = _unpacked({name: task.arrays[APART + name] for name in KEYS if APART + name in task.arrays})
        if earlier is None or len(log) < before - len(earlier):
            raise ProtocolError("trees.no-base", "a site was not told of the trees before those that it is asked about",
                                field="records", remedy="submit the study again")  # fmt: skip
        lacked = earlier[len(log) - (before - len(earlier)) :]
    grown = len(log)
    for record in [*lacked, *new[max(0, grown - before) :]]:
        log.add(record)
    if log.digests[-1] != digest.tobytes():
        raise ProtocolError(
            "trees.other-trees", "the trees that a site knows are not those that all are asked about", field="digest",
            remedy="the coordinator changed what it had told before, or has another version: do not go on with it",
        )  # fmt: skip
    return log


KEYS = ("records", "sizes")


def _packed(records: Sequence[Floats]) -> dict[str, Array]:
    sizes = np.array([len(record) for record in records], np.int64)
    return {"records": np.concatenate([*records, np.zeros(0)]), "sizes": sizes}


def _unpacked(arrays: Mapping[str, Any]) -> list[Floats] | None:
    """None where they are not as they should be."""
    records, sizes = arrays.get("records"), arrays.get("sizes")
    if records is None or sizes is None or records.dtype != np.float64 or sizes.dtype != np.int64:
        return None
    if records.ndim != 1 or sizes.ndim != 1 or (sizes < 0).any() or (sizes > len(records)).any():
        return None
    if sizes.sum() != len(records) or not np.isfinite(records).all():
        return None
    return np.split(records, np.cumsum(sizes)[:-1]) if len(sizes) else []
