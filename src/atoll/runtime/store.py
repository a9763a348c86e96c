"""The coordinator's run store: runs, finished reductions, metrics, enrolments and its ledger.

SQLAlchemy Core: SQLite by default, PostgreSQL by URL. A finished round and the ledger
entry that acknowledges its releases are stored in one transaction. Other processes of
the coordinator's operator (`submit`, `cancel`, `revoke` …) write requests here, which the
running coordinator picks up.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from atoll.contract.errors import IntegrityError, PlanError
from atoll.contract.plan import Plan
from atoll.contract.wire import Array, Json, Message, decode, encode, to_json
from atoll.ledger.entry import EMPTY, Chain, Entry, Signer, entry_line
from atoll.runtime.database import (
    ATTEMPTS,
    BLOBS,
    LEDGER,
    METRICS,
    PACES,
    ROUNDS,
    RUNS,
    SITES,
    TRAFFIC,
    UNTOLD,
    Database,
)

PART_BYTES = 16 << 20
"""Of a stored message, in one row."""
# what every round needs is made once: SQLAlchemy takes longer to make a statement than SQLite to execute it
_OF_RUN, _NUMBERED = ATTEMPTS.c.run == sa.bindparam("of"), ATTEMPTS.c.number == sa.bindparam("at")
_ATTEMPT = sa.select(ATTEMPTS.c.attempt).where(_OF_RUN, _NUMBERED)
_THE_BLOB = (BLOBS.c.run == sa.bindparam("of")) & (BLOBS.c.name == sa.bindparam("called"))
_BLOB, _NO_BLOB = sa.select(BLOBS.c.data).where(_THE_BLOB).order_by(BLOBS.c.part), BLOBS.delete().where(_THE_BLOB)
_INSERT = {table.name: table.insert() for table in (ATTEMPTS, BLOBS, ROUNDS, LEDGER, TRAFFIC, PACES, METRICS)}


def _now(timespec: str = "seconds") -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec=timespec)


def _text(note: str) -> str:
    """*note* without NUL, which PostgreSQL does not take."""
    return note.replace("\0", "")


class RunStore(Database):
    """All methods are short transactions; safe for threads."""

    # -- runs

    def create_run(self, plan: Plan, sites: Sequence[str], run: str = "", status: str = "submitted") -> str:
        """Store a submitted run (or one of that id and *status*); returns its random 128-bit id (hex)."""
        run = run or secrets.token_hex(16)
        with self._begin() as db:
            db.execute(
                RUNS.insert().values(
                    run=run, created=_now("microseconds"), status=status, name=plan.name,
                    plan=to_json(plan.to_json()).decode(), plan_hash=plan.hash, sites=json.dumps(list(sites)),
                    cancel=False, note="", result=None,
                )
            )  # fmt: skip
        return run

    def run(self, run: str) -> dict[str, Any]:
        """A run's row as a dict (plan and sites parsed); raises PlanError if there is none."""
        with self._begin() as db:
            row = db.execute(RUNS.select().where(RUNS.c.run == run)).mappings().first()
        if row is None:
            raise PlanError("run.unknown", "there is no such run", field="run", remedy="`atoll coordinator status`")
        return {**row, "plan": Plan.from_json(json.loads(row["plan"])), "sites": tuple(json.loads(row["sites"]))}

    def runs(self, *statuses: str) -> list[dict[str, Any]]:
        """Rows of all runs (or those with one of *statuses*), oldest first, without plans and results."""
        columns = [column for column in RUNS.c if column.name not in ("plan", "result")]
        query = sa.select(*columns).order_by(RUNS.c.created, RUNS.c.run)
        if statuses:
            query = query.where(RUNS.c.status.in_(statuses))
        with self._begin() as db:
            return [dict(row) for row in db.execute(query).mappings()]

    def set_status(self, run: str, status: str, note: str = "") -> None:
        """Change a run's status; *note* is what the operator reads."""
        with self._begin() as db:
            db.execute(RUNS.update().where(RUNS.c.run == run).values(status=status, note=_text(note)))

    def request_cancel(self, run: str) -> None:
        """Ask the running coordinator to cancel; raises PlanError if there is no such run."""
        with self._begin() as db:
            if db.execute(RUNS.update().where(RUNS.c.run == run).values(cancel=True)).rowcount != 1:
                raise PlanError("run.unknown", "there is no such run", field="run", remedy="`atoll coordinator status`")

    def end_run(
        self, run: str, status: str, note: str, sites: Sequence[str], error: Json,
        result: tuple[Mapping[str, Json], Mapping[str, Array]] | None = None,
    ) -> None:  # fmt: skip
        """Store how a run ended, its result and model if it has one, and that *sites* do not know it yet."""
        with self._begin() as db:
            if result is not None:
                self._write_blob(db, run, "model", Message("model", {}, dict(result[1])))
                db.execute(RUNS.update().where(RUNS.c.run == run).values(result=json.dumps(result[0])))
            db.execute(RUNS.update().where(RUNS.c.run == run).values(status=status, note=_text(note)))
            db.execute(UNTOLD.delete().where(UNTOLD.c.run == run))
            for site in sites:
                db.execute(UNTOLD.insert().values(site=site, run=run, status=status, error=json.dumps(error)))

    def owed_closes(self, site: str) -> list[tuple[str, str, Json]]:
        """(run, status, error) of ended runs that *site* must still be told of."""
        with self._begin() as db:
            rows = db.execute(sa.select(UNTOLD.c.run, UNTOLD.c.status, UNTOLD.c.error).where(UNTOLD.c.site == site))
            return [(run, status, json.loads(error)) for run, status, error in rows]

    def close_told(self, run: str, site: str) -> None:
        """*site* knows now."""
        with self._begin() as db:
            db.execute(UNTOLD.delete().where(UNTOLD.c.run == run, UNTOLD.c.site == site))

    def result(self, run: str) -> tuple[dict[str, Json], dict[str, Array]]:
        """A finished run's (result, model arrays); raises PlanError if it has none."""
        with self._begin() as db:
            text = db.execute(sa.select(RUNS.c.result).where(RUNS.c.run == run)).scalar()
            model = self._read_blob(db, run, "model")
        if text is None or model is None:
            raise PlanError("run.no-result", "the run has no result", field="run", remedy="wait until it is finished")
        return json.loads(text), model.arrays

    # -- rounds

    def begin_attempt(self, run: str, number: int) -> int:
        """How often round *number* was begun before: 0 at first, one more after every restart within it."""
        with self._begin() as db:
            before = db.execute(_ATTEMPT, {"of": run, "at": number}).scalar()
            if before is None:
                db.execute(_INSERT["attempts"], {"run": run, "number": number, "attempt": 0})
                return 0
            here = (ATTEMPTS.c.run == run, ATTEMPTS.c.number == number)
            db.execute(ATTEMPTS.update().where(*here).values(attempt=before + 1))
            return int(before) + 1

    def finish_round(
        self, run: str, number: int, stage: str, name: str, seconds: float, reduced: Message,
        entries: Sequence[Entry], receipts: Json, paces: Mapping[str, tuple[float, float | None]] | None = None,
        traffic_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Store a reduction, the ledger entries acknowledging it, and the receipts owed to sites; all or nothing.

        paces: for the schedule, by site: the share of work it was asked for, and how many seconds it took (None: did
        not answer in time). traffic_bytes: of the run until now.
        """
        with self._begin() as db:
            self._write_blob(db, run, f"round {number}", reduced)
            at = {"run": run, "number": number}
            told = {"stage": stage, "name": name, "seconds": seconds, "receipts": to_json(receipts).decode()}
            db.execute(_INSERT["rounds"], {**at, **told})
            if entries:
                lines = [{"seq": entry["seq"], "line": entry_line(entry).decode()} for entry in entries]
                db.execute(_INSERT["ledger"], lines)
            if traffic_bytes:
                db.execute(_INSERT["traffic"], {**at, "bytes": traffic_bytes})
            if paces:
                rows = [{**at, "site": s, "effort": effort, "seconds": took} for s, (effort, took) in paces.items()]
                db.execute(_INSERT["paces"], rows)

    def paces(self, run: str) -> list[tuple[dict[str, float], dict[str, float]]]:
        """What the schedule knows of finished rounds, in order: (effort by site asked, seconds by who answered)."""
        with self._begin() as db:
            rows = list(db.execute(PACES.select().where(PACES.c.run == run).order_by(PACES.c.number, PACES.c.site)))
        found: dict[int, tuple[dict[str, float], dict[str, float]]] = {}
        for _, number, site, effort, seconds in rows:
            asked, answered = found.setdefault(number, ({}, {}))
            asked[site] = effort
            if seconds is not None:
                answered[site] = seconds
        return list(found.values())

    def spent(self, run: str, before: int) -> tuple[float, int]:
        """(seconds, bytes) of a run's rounds before round number *before*; bytes only where its plan limits them."""
        with self._begin() as db:
            here = (ROUNDS.c.run == run, ROUNDS.c.number < before)
            seconds = db.execute(sa.select(sa.func.sum(ROUNDS.c.seconds)).where(*here)).scalar()
            last = sa.select(sa.func.max(TRAFFIC.c.bytes)).where(TRAFFIC.c.run == run, TRAFFIC.c.number < before)
            return float(seconds or 0), int(db.execute(last).scalar() or 0)

    def next_round(self, run: str) -> int:
        """One more than the number of the last finished round; 0 where there is none."""
        with self._begin() as db:
            last = db.execute(sa.select(sa.func.max(ROUNDS.c.number)).where(ROUNDS.c.run == run)).scalar()
            return 0 if last is None else int(last) + 1

    def reduced(self, run: str, number: int) -> Message | None:
        """The stored reduction of a round, or None."""
        with self._begin() as db:
            return self._read_blob(db, run, f"round {number}")

    def forget(self, run: str, number: int) -> None:
        """Drop a stored reduction that nobody will ask for again."""
        with self._begin() as db:
            db.execute(BLOBS.delete().where(BLOBS.c.run == run, BLOBS.c.name == f"round {number}"))

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """Finished rounds, in order."""
        with self._begin() as db:
            rows = db.execute(ROUNDS.select().where(ROUNDS.c.run == run).order_by(ROUNDS.c.number)).mappings()
            return [{**row, "receipts": json.loads(row["receipts"])} for row in rows]

    def owed(self, run: str) -> dict[str, list[Json]]:
        """The receipts of every site's last round; its earlier ones went out with its last task."""
        last: dict[str, list[Json]] = {}
        for finished in self.rounds(run):
            last.update(finished["receipts"])
        return last

    def save_checkpoint(
        self, run: str, number: int, stage: str, state: Mapping[str, Array], flights: Message | None = None
    ) -> None:
        """Store a program's state before round *number*, and what is in flight then, and forget reductions of earlier
        rounds of *stage*."""
        with self._begin() as db:
            self._write_blob(db, run, "flights", flights or Message("flights", {"rounds": []}))
            self._write_blob(db, run, "checkpoint", Message("checkpoint", {"number": number}, dict(state)))
            old = sa.select(sa.literal("round ") + sa.cast(ROUNDS.c.number, sa.String)).where(
                ROUNDS.c.run == run, ROUNDS.c.stage == stage, ROUNDS.c.number < number
            )
            db.execute(BLOBS.delete().where(BLOBS.c.run == run, BLOBS.c.name.in_(old)))

    def checkpoint(self, run: str) -> tuple[int, dict[str, Array]] | None:
        """(round number, state) of the last checkpoint, or None."""
        with self._begin() as db:
            stored = self._read_blob(db, run, "checkpoint")
        return (int(stored.meta["number"]), stored.arrays) if stored else None

    def flights(self, run: str) -> Message:
        """What was in flight at the last checkpoint (see ``runtime.courier.Flights``)."""
        with self._begin() as db:
            return self._read_blob(db, run, "flights") or Message("flights", {"rounds": []})

    def _write_blob(self, db: Connection, run: str, name: str, message: Message) -> None:
        db.execute(_NO_BLOB, {"of": run, "called": name})
        buffers = encode(message)
        if sum(map(len, buffers)) <= PART_BYTES:
            buffers = [b"".join(buffers)]
        part = 0
        for buffer in buffers:
            for start in range(0, len(buffer), PART_BYTES):
                data = bytes(buffer[start : start + PART_BYTES])
                db.execute(_INSERT["blobs"], {"run": run, "name": name, "part": part, "data": data})
                part += 1

    def _read_blob(self, db: Connection, run: str, name: str) -> Message | None:
        parts = [data for (data,) in db.execute(_BLOB, {"of": run, "called": name})]
        return decode(b"".join(parts)) if parts else None

    def add_metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Store metrics of one step, replacing those stored before a restart."""
        with self._begin() as db:
            db.execute(METRICS.delete().where(METRICS.c.run == run, METRICS.c.step == step))
            rows = [{"run": run, "step": step, "name": n, "value": float(v)} for n, v in values.items()]
            if rows:
                db.execute(_INSERT["metrics"], rows)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """All stored metrics, by step."""
        with self._begin() as db:
            rows = db.execute(METRICS.select().where(METRICS.c.run == run).order_by(METRICS.c.step)).mappings()
            return [{**row, "value": float("nan") if row["value"] is None else row["value"]} for row in rows]

    # -- enrolment

    def invite(self, site: str, token_hash: str, expires: int) -> None:
        """Remember an invitation; a later one for the same site replaces it. The site's old key stays
        valid until the new token is used, and a revoked site is invited anew by this."""
        with self._begin() as db:
            values = {"token_hash": token_hash, "token_expires": expires}
            blank = {"public_key": "", "certificates": "", "revoked": False, "seen": ""}
            if not db.execute(SITES.update().where(SITES.c.site == site).values(**values)).rowcount:
                db.execute(SITES.insert().values(site=site, **blank, **values))

    def enrol(self, site: str, token_hash: str, public_key: str, certificate: str) -> None:
        """Use up a token and bind the site's name to its public key (hex) and
        certificate (its fingerprint); raises IntegrityError."""
        with self._begin() as db:
            row = db.execute(SITES.select().where(SITES.c.site == site)).mappings().first()
            if row is None or not secrets.compare_digest(row["token_hash"], token_hash) or not token_hash:
                raise IntegrityError(
                    "token.refused", "the join token is unknown, used up or for another site", field="token",
                    remedy="ask the coordinator's operator for a new invitation",
                )  # fmt: skip
            if row["token_expires"] < dt.datetime.now(dt.UTC).timestamp():
                raise IntegrityError(
                    "token.expired", "the join token has expired", field="token", remedy="ask for a new invitation"
                )
            used = SITES.update().where(SITES.c.site == site, SITES.c.token_hash == token_hash)
            fresh = {"public_key": public_key, "certificates": certificate, "token_hash": "", "revoked": False}
            if db.execute(used.values(**fresh)).rowcount != 1:
                raise IntegrityError("token.refused", "the join token was used at the same moment", field="token")

    def add_certificate(self, site: str, certificate: str) -> None:
        """A renewed certificate (its fingerprint) is good for *site*, and so is the one in use until
        the new one is: answers may be lost on their way."""
        with self._begin() as db:
            before = db.execute(sa.select(SITES.c.certificates).where(SITES.c.site == site)).scalar() or ""
            kept = " ".join([certificate, *before.split()[-1:]])
            db.execute(SITES.update().where(SITES.c.site == site).values(certificates=kept))

    def confirm_certificate(self, site: str, certificate: str) -> None:
        """*certificate* is in use: no earlier one of *site* is good any longer."""
        with self._begin() as db:
            db.execute(SITES.update().where(SITES.c.site == site).values(certificates=certificate))

    def revoke(self, site: str) -> None:
        """Shut a site out; raises PlanError if it is unknown."""
        with self._begin() as db:
            change = SITES.update().where(SITES.c.site == site).values(revoked=True, token_hash="")
            if db.execute(change).rowcount != 1:
                raise PlanError(
                    "site.unknown", "there is no such site", field="site", remedy="`atoll coordinator status`"
                )

    def seen(self, site: str) -> None:
        """Note that a site connected now."""
        with self._begin() as db:
            db.execute(SITES.update().where(SITES.c.site == site).values(seen=_now()))

    def sites(self) -> dict[str, dict[str, Any]]:
        """Invited and enrolled sites by name: public_key ("" until enrolled), revoked, seen."""
        with self._begin() as db:
            rows = db.execute(SITES.select().order_by(SITES.c.site)).mappings()
            return {row["site"]: {k: row[k] for k in ("public_key", "certificates", "revoked", "seen")} for row in rows}

    def roster(self) -> dict[str, str]:
        """Public keys (hex) of the sites that may take part."""
        return {n: s["public_key"] for n, s in self.sites().items() if s["public_key"] and not s["revoked"]}

    # -- ledger

    def ledger(self, public: bytes, sign: Signer) -> Ledger:
        """The coordinator's ledger, begun if it is new."""
        with self._begin() as db:
            last = db.execute(sa.select(LEDGER.c.line).order_by(LEDGER.c.seq.desc()).limit(1)).scalar()
        entry: dict[str, Json] = json.loads(last) if last else {"seq": -1, "hash": EMPTY}
        ledger = Ledger(self, Chain("coordinator", public, sign, entry["seq"], entry["hash"]))
        if not last:
            ledger.append(ledger.chain.genesis())
        return ledger

    def append_entry(self, entry: Entry) -> None:
        """Store one ledger entry."""
        with self._begin() as db:
            db.execute(LEDGER.insert().values(seq=entry["seq"], line=entry_line(entry).decode()))

    def entry_of(self, kind: str, run: str) -> Entry | None:
        """The last ledger entry of a *kind* that is about *run*, if there is one."""
        likely = LEDGER.c.line.contains(f'"kind":"{kind}"') & LEDGER.c.line.contains(run)
        with self._begin() as db:
            lines = db.execute(sa.select(LEDGER.c.line).where(likely).order_by(LEDGER.c.seq.desc())).scalars().all()
        entries: list[Entry] = [json.loads(line) for line in lines]
        return next((e for e in entries if e["kind"] == kind and e["body"].get("run") == run), None)

    def export_ledger(self, path: Path) -> None:
        """Write the ledger as JSON lines."""
        with self._begin() as db, path.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for (line,) in db.execute(sa.select(LEDGER.c.line).order_by(LEDGER.c.seq)))


class Ledger:
    """The coordinator's ledger in the run store."""

    def __init__(self, store: RunStore, chain: Chain) -> None:
        self._store, self.chain = store, chain

    def append(self, entry: Entry) -> None:
        """Store an entry made by ``chain.next`` and move the head."""
        self._store.append_entry(entry)
        self.chain.commit(entry)

    def record(self, kind: str, body: Entry) -> Entry:
        """Make, sign and store one entry."""
        entry = self.chain.next(kind, body)
        self.append(entry)
        return entry
