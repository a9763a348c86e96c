"""The folders a party lives in: configuration, keys (mode 0600), certificates, journal or store.

coordinator:  coordinator.yaml  ca.key  ca.pem  identity.key  store.db  listening.json
site:         site.yaml  policy.yaml  ca.pem  identity.key  tls.key  tls.pem  journal.db
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import IntegrityError, PlanError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.settings import read_yaml, validate
from atoll.contract.wire import Json
from atoll.crypto import pki
from atoll.crypto.identity import Identity, check_private, write_private
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.store import RunStore
from atoll.transport.grpc_channel import call_unary, join_address

POLICY_TEMPLATE = """\
# What this site lets happen to its data. The site enforces it; the coordinator cannot lift it.
programs: ["statistics.*", "horizontal.*", "trees.*"]   # names that may run here, optionally name@version
purposes: [research]                         # what studies may be for
protections: [secagg, paillier, ckks]        # add "plain" to let the coordinator see this site's own sums
min_group_size: 5                            # fewest people behind a released count, or cell of a table
dominant_people: 2                           # a cell is withheld where so few people …
dominant_share: 0.85                         # … make more than this share of its total
repeats: refuse                              # the same exact query over nearly the same rows (or: allow)
min_sites: 3                                 # fewest sites in a study, and survivors in a sum
share: []                                    # own values that may leave un-summed: rows, metrics, quality, risk
withhold: []                                 # data classes that no program may read: identifier, trajectory …
approval: manual                             # ask the operator about every study (or: automatic)
budgets:                                     # what each data set may cost, statistics and training together
  "*": {unit: record, epsilon: 10, delta: 1.0e-4, per: year, exact_releases: 10000}
roster: manual                               # ask the operator about every new identity (or: automatic)
models: []                                   # networks of other packages that plans may name: "package.nets:Net"
audit: null                                  # or {max_leak_rate: 0.0}: no training before `atoll site audit PLAN`
"""


PUBLIC_KEY = "[0-9a-f]{64}"
RENEW_S = 3600.0
"""How often at most a certificate is renewed by one clock alone, which may be wrong, or lie."""


class CoordinatorConfig(BaseModel):
    """coordinator.yaml. host: where to listen; address: how sites reach it (default: host).
    store: SQLAlchemy URL (default: SQLite in the folder). certificate_days: lifetime of certificates. models: networks
    of other packages that plans may name (``package.nets:Net``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: str = "atoll"
    host: str = "127.0.0.1"
    address: str = ""
    port: int = Field(default=7443, ge=0, le=65535)
    enrol_port: int = Field(default=7444, ge=0, le=65535)
    store: str = ""
    certificate_days: float = Field(default=7.0, gt=0, le=398)
    models: tuple[str, ...] = ()


class SiteConfig(BaseModel):
    """site.yaml. datasets: the tables that plans may name, by their *dataset*. at_once: how many runs compute here at
    the same time (default: as many as there are cores)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    address: str
    coordinator_key: str
    datasets: Mapping[str, SourceSpec] = Field(default_factory=dict)
    at_once: int | None = Field(default=None, ge=1)


def _new_folder(folder: Path, *marks: str) -> None:
    if any((folder / mark).exists() for mark in marks):
        raise PlanError("home.exists", f"{folder} is set up already", field="home", remedy="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _need(folder: Path, mark: str, command: str) -> None:
    if not (folder / mark).is_file():
        raise PlanError("home.missing", f"{folder} is not set up", field="home", remedy=f"run `{command}` first")


class CoordinatorHome:
    """The coordinator's folder."""

    def __init__(self, folder: Path) -> None:
        _need(folder, "coordinator.yaml", "atoll coordinator init")
        self.folder = folder
        self.config = validate(CoordinatorConfig, read_yaml(folder / "coordinator.yaml", "config"), "config")
        self.identity = Identity.load("coordinator", folder / "identity.key")
        self.ca = pki.CertificateAuthority.load(folder)
        self.lifetime = dt.timedelta(days=self.config.certificate_days)
        self._server_pair: tuple[bytes, bytes] | None = None

    @staticmethod
    def create(folder: Path, config: CoordinatorConfig) -> CoordinatorHome:
        """A new coordinator: its CA and identity. Raises PlanError if the folder is one already."""
        _new_folder(folder, "coordinator.yaml")
        pki.CertificateAuthority.create(config.federation).save(folder)
        Identity.generate("coordinator").save(folder / "identity.key")
        (folder / "coordinator.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return CoordinatorHome(folder)

    def store(self) -> RunStore:
        """The run store."""
        return RunStore(self.config.store or f"sqlite:///{self.folder.absolute() / 'store.db'}")

    def server_pair(self) -> tuple[bytes, bytes]:
        """The server's TLS key and certificate, renewed when a third of its life is left; memory only."""
        if self._server_pair is None or pki.needs_renewal(self._server_pair[1]):
            hosts = {self.config.host, self.config.address or self.config.host, "localhost"} - {"0.0.0.0", "::"}  # noqa: S104
            self._server_pair = self.ca.issue_server(sorted(hosts), self.lifetime)
        return self._server_pair

    def listening(self) -> tuple[int, int]:
        """The ports in use: those the running coordinator wrote down, else the configured ones."""
        try:
            ports = json.loads((self.folder / "listening.json").read_text())
            return int(ports["port"]), int(ports["enrol_port"])
        except (OSError, ValueError, KeyError, TypeError):
            return self.config.port, self.config.enrol_port

    def listen_on(self, port: int, enrol_port: int) -> None:
        """Write down the ports in use."""
        told = {"port": port, "enrol_port": enrol_port, "pid": os.getpid()}
        _replace(self.folder / "listening.json", json.dumps(told))

    def invite(self, store: RunStore, site: str, lifetime: dt.timedelta) -> pki.JoinToken:
        """A one-time token for *site*; any earlier one of the site is void."""
        address = join_address(self.config.address or self.config.host, self.listening()[1])
        token = pki.JoinToken.create(site, address, self.ca, lifetime)
        store.invite(site, pki.secret_hash(token.secret), token.expires)
        return token

    # -- what the enrolment and renewal services answer

    def authorise(self, store: RunStore, certificate_pem: bytes) -> str:
        """The enrolled, unrevoked site that a certificate of our CA belongs to; raises IntegrityError."""
        site, fingerprint = pki.read_site_certificate(certificate_pem, self.ca)
        if pki.expired(certificate_pem):  # a TLS session that is resumed does not look again
            raise IntegrityError(
                "certificate.expired", f"by the coordinator's clock, {pki.clock()}, the site's certificate has expired",
                field=site, remedy="if that clock is right, ask the coordinator's operator for a new invitation",
            )  # fmt: skip
        row = store.sites().get(site)
        good = row["certificates"].split() if row and row["public_key"] and not row["revoked"] else []
        if fingerprint not in good:
            raise IntegrityError(
                "certificate.revoked", "the certificate was revoked or replaced", field=site,
                remedy="ask the coordinator's operator for a new invitation",
            )  # fmt: skip
        if fingerprint != good[-1]:
            store.confirm_certificate(site, fingerprint)
        return site

    def enrol(self, store: RunStore, request: Mapping[str, Json]) -> Mapping[str, Json]:
        """Use up a join token: the site's certificate from its CSR, bound to its identity key."""
        match request:
            case {"site": str(site), "secret": str(secret), "csr": str(csr), "public_key": str(public)}:
                certificate = self.ca.issue_site(csr.encode(), site, self.lifetime)
                if not re.fullmatch(PUBLIC_KEY, public):
                    raise IntegrityError("enrol.key", "the identity key is not an Ed25519 key", field="public_key")
                store.enrol(site, pki.secret_hash(secret), public, pki.certificate_fingerprint(certificate))
                return {"certificate": certificate.decode(), "coordinator_key": self.identity.public.hex(),
                        "port": self.listening()[0]}  # fmt: skip
        raise IntegrityError("enrol.malformed", "the enrolment request is malformed")

    def renew(self, store: RunStore, site: str, request: Mapping[str, Json]) -> Mapping[str, Json]:
        """A fresh certificate for a site that still has a good one."""
        certificate = self.ca.issue_site(str(request.get("csr")).encode(), site, self.lifetime)
        store.add_certificate(site, pki.certificate_fingerprint(certificate))
        return {"certificate": certificate.decode()}


class SiteHome:
    """A site's folder."""

    def __init__(self, folder: Path) -> None:
        _need(folder, "site.yaml", "atoll site init")
        self.folder = folder
        self.config = validate(SiteConfig, read_yaml(folder / "site.yaml", "config"), "config")
        self.identity = Identity.load(self.config.name, folder / "identity.key")
        self.policy = Policy.load(folder / "policy.yaml")
        self.ca_pem = (folder / "ca.pem").read_bytes()
        self.scratch = folder / "scratch"
        self._asked = -math.inf  # for a renewal, by monotonic time

    @staticmethod
    async def create(
        folder: Path, token_text: str, datasets: Mapping[str, SourceSpec], policy: Policy | None = None,
        call: Callable[..., Awaitable[Mapping[str, Json]]] = call_unary,
    ) -> SiteHome:  # fmt: skip
        """Join a federation: make keys here, have the certificate signed, write the folder.

        A folder that is this very site's already joins again: it keeps its identity, journal, policy
        and data sets, and gets a new certificate (the way back after one has expired or was revoked). call: how the
        coordinator is asked.
        Raises IntegrityError for a token that is malformed, expired, used or foreign, and
        TransportError when the coordinator cannot be reached; the folder is then as it was.
        """
        token = pki.JoinToken.decode(token_text)
        before = SiteHome(folder) if (folder / "site.yaml").is_file() else None
        if before is None or before.config.name != token.site:
            before = None
            _new_folder(folder, "site.yaml", "identity.key", "tls.key")
        identity, key = before.identity if before else Identity.generate(token.site), pki.new_key()
        request = {"site": token.site, "secret": token.secret, "public_key": identity.public.hex()}
        request["csr"] = pki.make_csr(key, token.site).decode()
        answer = await call(token.address, token.ca_pem, None, "Enrol", request)
        certificate, host = _certificate(answer), token.address.rsplit(":", 1)[0]
        match answer:
            case {"port": int(port), "coordinator_key": str(public)} if re.fullmatch(PUBLIC_KEY, public):
                known = {**(before.config.datasets if before else {}), **datasets}
                config = SiteConfig(
                    name=token.site, address=f"{host}:{port}", coordinator_key=public, datasets=known,
                    at_once=before.config.at_once if before else None,
                )  # fmt: skip
            case _:
                raise ProtocolError("enrol.malformed", "the coordinator's answer is not what was asked for")
        if before is None:
            identity.save(folder / "identity.key")
            content = yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False) if policy else POLICY_TEMPLATE
            (folder / "policy.yaml").write_text(content)
        (folder / "tls.key").unlink(missing_ok=True)
        write_private(folder / "tls.key", pki.key_pem(key))
        _replace(folder / "tls.pem", certificate)
        _replace(folder / "ca.pem", token.ca_pem.decode())
        _replace(folder / "site.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return SiteHome(folder)

    def journal(self) -> Journal:
        """The site's journal, made on first use (mode 0600)."""
        path = self.folder / "journal.db"
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        return Journal(path, self.identity.name, self.identity.public, self.identity.sign)

    def data(self, plan: Plan) -> SiteData:
        """The table a plan names, checked and prepared; raises SchemaError."""
        if plan.dataset not in self.config.datasets:
            raise PlanError(
                "site.no-dataset", f"the site has no data set {plan.dataset!r}", field="dataset",
                remedy="add it under 'datasets' in the site's site.yaml",
            )  # fmt: skip
        return SiteData.read(self.config.datasets[plan.dataset], plan, self.folder, self.config.name, self.scratch)

    def pair(self) -> tuple[bytes, bytes]:
        """The TLS key and certificate; raises IntegrityError when it has expired."""
        certificate = (self.folder / "tls.pem").read_bytes()
        if pki.expired(certificate):
            raise IntegrityError(
                "certificate.expired", f"by this site's clock, {pki.clock()}, its certificate has expired",
                field="tls.pem", remedy="set the clock right; if it is, ask for a new invitation and enrol again",
            )  # fmt: skip
        return check_private(self.folder / "tls.key"), certificate

    async def renew(self, call: Any, *, force: bool = False, at: dt.datetime | None = None) -> bool:
        """Renew the certificate when a third of its life is left (or by *force*); True if it was.

        That is when this site's clock and the coordinator's say so; or only one of the two, but then once in RENEW_S.
        call: sends {"csr"} to the coordinator and returns its answer. at: the time by the coordinator's clock (default:
        by this site's).
        """
        held, before, now = (self.folder / "tls.pem").read_bytes(), self._asked, time.monotonic()
        due = [pki.needs_renewal(held, clock) for clock in (None, at)]
        if not (force or all(due) or (any(due) and now >= before + RENEW_S)):
            return False
        key, self._asked = pki.load_key(check_private(self.folder / "tls.key")), now
        try:
            answer = await call({"csr": pki.make_csr(key, self.config.name).decode()})
        except (TransportError, asyncio.CancelledError):  # lost on the way: it may be asked for at once
            self._asked = before
            raise
        # durably: once it is used, the old one is good no longer
        await asyncio.to_thread(_replace, self.folder / "tls.pem", _certificate(answer))
        return True


def _replace(path: Path, content: str) -> None:
    """Write a file durably; who reads it meanwhile, or after this process was killed, has all of it, or what was."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _certificate(answer: Mapping[str, Json]) -> str:
    """The certificate in a coordinator's answer; raises ProtocolError when there is none."""
    certificate = str(answer.get("certificate"))
    try:
        pki.certificate_fingerprint(certificate.encode())
    except ValueError:
        raise ProtocolError("enrol.malformed", "the coordinator's answer holds no certificate") from None
    return certificate
