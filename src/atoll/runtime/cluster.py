"""The sandbox on a Ray cluster: every site lives in an actor, with its own table, journal and policy, and the driver is
the coordinator. The same plan gives the same numbers as over the ``local`` transport.

A node reads the sources of the sites that it is given, by the paths in SITES.yaml: on several machines these must be on
a file system that all of them see, or in a database.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.contract.plan import Plan
from atoll.contract.wire import Json, Message
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.models.allowed import allow, asked_in
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator, Event
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.transport.base import Progress
from atoll.transport.ray import RayTransport

HERE = f"{__name__}:resident"


class Resident:
    """A site in an actor (see :class:`atoll.transport.ray.Resident`). Identity and journal are in a folder of the node,
    by the run's random name, so that the site goes on when its actor was started again there."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """settings: "plan", "source", "base", "folder", and "coordinator", its public key in hex."""
        plan, spec = Plan.from_json(settings["plan"]), SourceSpec.model_validate(settings["source"])
        allow(asked_in(plan.params))  # it is one's own
        self._folder = Path(tempfile.gettempdir()) / settings["folder"] / name
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = self._folder / "identity.pem"
        if not key.exists():
            Identity.generate(name).save(key)
        own = Identity.load(name, key)
        data = SiteData.read(spec, plan, Path(settings["base"]), name)
        self._journal = Journal(self._folder / "journal.db", name, own.public, own.sign)
        coordinator = bytes.fromhex(settings["coordinator"])
        self._site = Site(own, self._journal, Policy.sandbox(), lambda _: data, coordinator)
        self.about: Json = {"public": own.public.hex()}

    def handle(self, message: Message, progress: Progress) -> Message:
        """See :meth:`atoll.runtime.site.Site.handle`."""
        return self._site.handle(message, progress)

    def leave(self) -> bytes:
        """The ledger, as JSON lines."""
        exported = self._folder / "ledger.jsonl"
        self._journal.export(exported)
        self._journal.close()
        found: bytes = exported.read_bytes()
        for left in self._folder.iterdir():
            left.unlink()
        self._folder.rmdir()
        return found


def resident(name: str, settings: Mapping[str, Any]) -> Resident:
    """What an actor makes of a site's settings."""
    load_installed()
    settle()
    return Resident(name, settings)


def run_cluster(
    plan: Plan, sources: Mapping[str, SourceSpec], base: Path, scratch: Path, ledgers: Path, tell: Event,
    address: str | None = None,
) -> tuple[RunStore, str]:  # fmt: skip
    """Drive one run; the caller closes the store. address: of a running cluster; None: one on this machine. Raises the
    AtollError that ended it."""
    store = RunStore(f"sqlite:///{scratch / 'store.db'}", durable=False)
    identity = Identity.generate("coordinator")
    ledger, folder = store.ledger(identity.public, identity.sign), f"atoll-{os.urandom(8).hex()}"
    alike = {"plan": plan.to_json(), "base": str(base.absolute()), "folder": folder}
    alike["coordinator"] = identity.public.hex()
    settings: dict[str, Json] = {
        name: {**alike, "source": spec.model_dump(mode="json")} for name, spec in sources.items()
    }
    tell({"starting": "Ray"})
    transport = RayTransport(HERE, settings, address=address)
    try:
        for number, (name, told) in enumerate(transport.about.items()):
            store.invite(name, f"{number:064x}", 2**31 - 1)
            store.enrol(name, f"{number:064x}", str(told["public"]), "")
        run = store.create_run(plan, tuple(sources))
        asyncio.run(Coordinator(transport, store, ledger, on_event=tell).run(run))
    finally:
        store.export_ledger(ledgers / "coordinator.jsonl")
        for name, lines in transport.leave().items():
            (ledgers / f"{name}.jsonl").write_bytes(lines)
        transport.close()
    return store, run
