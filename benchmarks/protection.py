"""Protected sums beside their physical limit: masks, dropouts, and rounds a second.

The limit of masking is measured in the same run, on the same core: making the mask bytes that a site needs with
AES-CTR, in pieces that stay in the cache, and adding each of them once. Federations are in this process, with journals
and ledgers.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import benchmarks.programs  # noqa: F401 (registers)
from atoll.contract.errors import TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.protection import Choice, Exchange, Terms
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, real
from atoll.contract.wire import Array, Message
from atoll.crypto.identity import Identity
from atoll.crypto.prg import CHUNK_BYTES, Stream, fresh_key
from atoll.crypto.session import Session, claim
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.privacy.secagg.masking import SecAgg
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.party import Own
from atoll.runtime.policy import Policy
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.transport.base import Endpoint, Progress
from atoll.transport.local import LocalTransport
from benchmarks.table import Row, main

SEED = 0
STEP = 1e-6
PLAN: dict[str, Any] = {
    "name": "benchmark",
    "schema": {"name": "numbers", "columns": {"x": {"range": [0, 1]}}},
    "cohort": {"min_sites": 1},
}


@program("bench.some", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Some:
    """One Sum of a vector of ones, over whoever is left."""

    class Params(ProgramParams):
        """size: float64 elements."""

        size: int

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"sites": how many took part, "smallest" and "largest": of the sum's elements}."""
        summed = yield Round("ones", Sum(), {"x": real(self.params.size, bound=1, step=STEP)})
        x = summed["x"]
        return {"sites": len(summed.sites), "smallest": float(x.min()), "largest": float(x.max())}

    @handler("ones")
    def ones(self, site: SiteView, task: Task) -> Reply:
        """At the site: a vector of ones."""
        return {"x": np.ones(self.params.size)}


# ---------------------------------------------------------------- one site's masks


class _Reply:
    """A site's arrays, as the coordinator's half reads them."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def array(self, name: str) -> Array:
        return self._arrays[name]

    def pieces(self, name: str) -> Any:
        return iter([(0, self._arrays[name].reshape(-1))])


class Masking:
    """Both halves of secagg by hand up to the first site's reply, which can be asked again and again."""

    def __init__(self, num_sites: int, size: int) -> None:
        names = [f"site-{i}" for i in range(num_sites)]
        self.fields = {"x": real(size, bound=1, step=STEP, dtype="<f4")}
        random = np.random.default_rng(SEED)
        self.reply = {"x": random.uniform(-1, 1, size).astype(np.float32)}
        identities = {name: Identity.generate(name) for name in names}
        sessions = {name: Session(Session.fresh()) for name in names}
        signed = {n: s.public + identities[n].sign(claim("run", "roster", n, s.public)) for n, s in sessions.items()}
        self.terms = Terms("run", 0, 0, {n: i.public for n, i in identities.items()}, "roster", 1, Choice(sum="secagg"))
        self.site, self.identity, self.session, self.secagg = (
            names[0],
            identities[names[0]],
            sessions[names[0]],
            SecAgg(),
        )
        self.traffic_bytes = 0
        combining = self.secagg.combine(Round("r", Sum(), self.fields), names, self.terms, signed)
        shares: Exchange = next(combining)
        states: dict[str, dict[str, Array]] = {name: {} for name in names}
        replies: dict[str, Any] = {}
        for name in names:
            party = Own(name, self.terms, sessions[name], shares.send_to[name], states[name],
                        identities[name].sign, Policy.sandbox())  # fmt: skip
            replies[name] = self.secagg.answer("shares", party, {}, self.fields)
        self.state = states[self.site]
        asked: Any = combining.send({name: _Reply(reply) for name, reply in replies.items()})
        self.sent = {**asked.send, **asked.send_to[self.site]}
        vector = self.answer()
        survivors, signatures, unmasked = num_sites, num_sites * 65, num_sites * 32
        exchanged = [shares.send_to[self.site], replies[self.site], self.sent, vector]
        self.vector_bytes = sum(array.nbytes for array in vector.values())
        self.traffic_bytes = sum(a.nbytes for arrays in exchanged for a in arrays.values())
        self.traffic_bytes += survivors + 64 + signatures + unmasked

    def answer(self) -> dict[str, Array]:
        """The site half's answer to "reply": encoded, and under all its masks."""
        party = Own(
            self.site, self.terms, self.session, self.sent, dict(self.state), self.identity.sign, Policy.sandbox()
        )
        return self.secagg.answer("reply", party, self.reply, self.fields)


def limit(num_masks: int, vector: Array) -> None:
    """Make the mask bytes, in pieces that stay in the cache, and add them once."""
    streams = [Stream(fresh_key()) for _ in range(num_masks)]
    scratch = bytearray(CHUNK_BYTES)
    mask = np.frombuffer(scratch, vector.dtype)
    for start in range(0, vector.size, mask.size):
        piece = vector[start : start + mask.size]
        for stream in streams:
            stream.into(memoryview(scratch)[: piece.nbytes])
            np.add(piece, mask[: piece.size], out=piece)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, for one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def masks(quick: bool) -> list[Row]:
    """A site's CPU and traffic for one sum of a long vector."""
    num_sites, size, repeats = 10, 1_000_000 if quick else 10_000_000, 9
    made = Masking(num_sites, size)
    vector = np.zeros(size, np.uint32)
    ours, peers = [], []
    for _ in range(repeats):  # by turns, so that a busy machine slows both
        ours.append(cpu_seconds(made.answer))
        peers.append(cpu_seconds(lambda: limit(num_sites, vector)))
    seconds, peer = statistics.median(ours), statistics.median(peers)
    what = f"secagg of {size / 1e6:g}M float32, {num_sites} sites"
    return [
        Row(f"{what}: a site's CPU", seconds, "s", peer, None, "peer: the mask bytes by AES-CTR, added once"),
        Row("the same, ratio", seconds / peer, "×", None, 1.5),
        Row("the same, traffic to and from a site, of the fixed-point vector", made.traffic_bytes / (4 * size), "×",
            None, 1.05, f"{made.traffic_bytes / 1e6:.2f} MB"),
    ]  # fmt: skip


# ---------------------------------------------------------------- whole federations


def _data(plan: Plan) -> SiteData:
    return SiteData.of(Table(plan.table, {"x": np.zeros(8)}), plan, "site")


def federated(
    protection: str, num_sites: int, program: str, params: Mapping[str, Any], wrap: Callable[[str, Endpoint], Endpoint]
) -> tuple[dict[str, Any], list[float]]:
    """(result, seconds of each round) over the local transport."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = RunStore(f"sqlite:///{folder / 'store.db'}", durable=False)
        identity = Identity.generate("coordinator")
        journals, endpoints = [], {}
        for number in range(num_sites):
            own = Identity.generate(f"site-{number:03}")
            store.invite(own.name, f"{number:064x}", 2**31 - 1)
            store.enrol(own.name, f"{number:064x}", own.public.hex(), "")
            journals.append(Journal(folder / f"{number}.db", own.name, own.public, own.sign, temporary=True))
            site = Site(own, journals[-1], Policy.sandbox(), _data, identity.public)
            endpoints[own.name] = wrap(own.name, site.handle)
        transport = LocalTransport(endpoints)
        plan = Plan.from_json({**PLAN, "protection": protection, "program": program, "params": dict(params)})
        coordinator = Coordinator(transport, store, store.ledger(identity.public, identity.sign))
        run = store.create_run(plan, tuple(endpoints))
        result = asyncio.run(coordinator.run(run))["result"]
        seconds = [row["seconds"] for row in store.rounds(run)]
        transport.close()
        store.close()
        for journal in journals:
            journal.close()
    return result, seconds


def _stays(_: str, endpoint: Endpoint) -> Endpoint:
    return endpoint


def _gone(lost: Mapping[str, Sequence[str]]) -> Callable[[str, Endpoint], Endpoint]:
    """Sites that cannot be reached any more from a step on (lost: sites by step)."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        away = False

        def handle(message: Message, progress: Progress) -> Message:
            nonlocal away
            away = away or name in lost.get(str(message.meta.get("step")), ())
            if away:
                raise TransportError("link.lost", "gone", field=name)
            return endpoint(message, progress)

        return handle

    return wrap


def dropouts(quick: bool) -> list[Row]:
    """A round of many sites that loses a tenth of them half-way."""
    num_sites, size = (70, 1000) if quick else (100, 10_000)
    names = [f"site-{i:03}" for i in range(0, num_sites, 10)]
    lost = {"reply": names[: len(names) // 2], "unmask": names[len(names) // 2 :]}
    result, seconds = federated("secagg", num_sites, "bench.some", {"size": size}, _gone(lost))
    left = num_sites - len(lost["reply"])
    wrong = max(abs(result[end] - left) for end in ("smallest", "largest")) + (result["sites"] != left)
    what = f"secagg, {num_sites} sites of which {len(names)} drop out"
    return [
        Row(f"{what}, {size:,} numbers", sum(seconds), "s", None, 30.0, "all sites on this machine's cores"),
        Row("the same, rounds it took", len(seconds), "", None, 1),
        Row("the same, error of the survivors' sum", wrong, "", None, num_sites * STEP / 2),
    ]  # fmt: skip


def rounds(quick: bool) -> list[Row]:
    """Small sums, again and again."""
    found = []
    for num_sites in (3, 10):
        many = 30 if quick else 100
        by = {
            protection: statistics.median(federated(protection, num_sites, "bench.noop", {"rounds": many}, _stays)[1])
            for protection in ("plain", "secagg")
        }
        found += [
            Row(f"rounds of small sums, {num_sites} local sites, secagg", 1 / by["secagg"], "1/s", 1 / by["plain"],
                None, "peer: protection plain, which has one step, not four"),
            Row("the same, a step of a site", by["secagg"] / num_sites / 4 * 1e3, "ms", by["plain"] / num_sites * 1e3),
        ]  # fmt: skip
    return found


def measure(quick: bool) -> list[Row]:
    """All rows."""
    load_installed()
    settle()
    return [*masks(quick), *dropouts(quick), *rounds(quick)]


if __name__ == "__main__":
    main("protection", ["atoll", "cryptography", "numpy"], measure, SEED)
