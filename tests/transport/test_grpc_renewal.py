"""Certificates renew themselves, whatever is lost on the way; revocation and re-enrolment end them."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509

from atoll.contract.errors import IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import Message
from atoll.crypto import pki
from atoll.runtime.home import SiteHome
from atoll.runtime.serve import CoordinatorServer, serve_site
from atoll.transport.grpc import _configuration
from atoll.transport.grpc_channel import call_unary, on_channel
from atoll.transport.grpc_site import GrpcSite
from atoll.transport.link import Link

PATIENCE_S = 120.0


def pem(home: SiteHome) -> bytes:
    return (home.folder / "tls.pem").read_bytes()


def good(hq: Any, certificate: bytes) -> bool:
    try:
        hq.home.authorise(hq.store, certificate)
    except IntegrityError as error:
        assert error.code in ("certificate.revoked", "certificate.expired") and error.remedy
        return False
    return True


async def test_a_certificate_renews_itself_while_the_site_works(headquarters: Any, monkeypatch: Any) -> None:
    """It lives for two hours, and then it is an hour and a half later."""
    hq, now = await headquarters(certificate_days=2 / 24).listen(), pki.now
    home = await hq.enrol("a")
    first = pem(home)
    assert not await home.renew(None)  # it is young yet
    hq.up_site(home)
    await hq.up("a")
    asked = 0
    monkeypatch.setattr(pki, "now", lambda: now() + dt.timedelta(minutes=90))
    while hq.connected.count("a") < 2:
        asked += 1
        x = np.full(200_000, asked)
        assert (await hq.ask("a", str(asked), {"x": x})).arrays["x"][-1] == asked
    await hq.ask("a", "with the new one")
    old, new = (x509.load_pem_x509_certificate(one) for one in (first, pem(home)))
    assert new.not_valid_after_utc > old.not_valid_after_utc and new.public_key() == old.public_key()
    assert hq.connected == ["a", "a"] and set(hq.states["a"]) == {"connected", "disconnected"}
    assert good(hq, pem(home)) and not good(hq, first)
    assert not list(home.folder.glob("*.new"))


async def test_an_expired_certificate_is_refused_beyond_tls(headquarters: Any, monkeypatch: Any) -> None:
    """A TLS session that is resumed does not look at the certificate's end again."""
    hq = await headquarters(certificate_days=1).listen()
    certificate, later = pem(await hq.enrol("a")), pki.now() + dt.timedelta(days=2)
    assert hq.home.authorise(hq.store, certificate) == "a"
    monkeypatch.setattr(pki, "now", lambda: later)
    with pytest.raises(IntegrityError) as error:
        hq.home.authorise(hq.store, certificate)
    assert error.value.code == "certificate.expired" and error.value.where == {} and error.value.field == "a"


def test_handshakes_get_another_configuration_only_for_a_renewed_certificate(headquarters: Any) -> None:
    """gRPC frees the one before while other handshakes use it."""
    ca = pki.CertificateAuthority.create("tests")
    pairs = [ca.issue_server(["127.0.0.1"]), ca.issue_server(["127.0.0.1"])]
    now = [pairs[0]]
    first, renewed = _configuration(lambda: now[0], ca.pem)
    assert first is not None and [renewed() for _ in range(3)] == [None] * 3
    now[0] = pairs[1]
    assert renewed() is not None and renewed() is None


async def test_a_renewal_does_not_disturb_what_is_under_way(headquarters: Any) -> None:
    begun, go_on, asked, force = threading.Event(), threading.Event(), [], asyncio.Event()

    def slow(message: Message, progress: Any) -> Message:
        asked.append(message.meta["id"])
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return Message("echo", {"re": message.meta["id"]}, message.arrays)

    async def renew(channel: Any) -> bool:
        if not force.is_set():
            return False
        force.clear()
        return await home.renew(lambda request: on_channel(channel, "Renew", request), force=True)

    hq = await headquarters().listen()
    home = await hq.enrol("a")
    hq.up_site(home, slow, renew=renew)
    await hq.up("a")
    asking = asyncio.create_task(hq.ask("a", "1", {"x": np.arange(500_000)}))
    await hq.until(begun.is_set)
    before = pem(home)
    force.set()
    await hq.until(lambda: len(hq.connected) == 2)
    go_on.set()
    assert (await asking).arrays["x"][-1] == 499_999
    assert asked == ["1"] and pem(home) != before


async def test_answers_that_are_lost_do_not_lock_the_site_out(headquarters: Any) -> None:
    """The coordinator issues a certificate three times, and the site never hears of it."""
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    lost: list[Any] = []

    async def renew(channel: Any) -> bool:
        async def call(request: Any) -> Any:
            answer = await on_channel(channel, "Renew", request)
            if len(lost) < 3:
                lost.append(answer)
                raise TransportError("transport.unreachable", "the answer was lost")
            return answer

        return await home.renew(call, force=len(hq.connected) == 1)

    first = pem(home)
    site = hq.up_site(home, renew=renew)
    await hq.until(lambda: len(hq.connected) == 2 or site.done())
    assert not site.done() and len(lost) == 3 and pem(home) != first
    assert (await hq.ask("a", "1")).meta["re"] == "1"
    assert not good(hq, first) and not any(good(hq, answer["certificate"].encode()) for answer in lost)


async def test_the_old_certificate_is_good_until_the_new_one_is_used(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    first = pem(home)
    for _ in range(3):
        answer = hq.home.renew(hq.store, "a", {"csr": pki.make_csr(pki.new_key(), "a").decode()})
        assert good(hq, first)
    newest = answer["certificate"].encode()
    assert good(hq, newest) and not good(hq, first) and good(hq, newest)


async def test_a_renewal_that_fails_does_not_end_the_site(headquarters: Any) -> None:
    """The coordinator does not answer for a while, or answers nonsense."""
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    answers = [TransportError("transport.unreachable", "away"), {}, {"certificate": "nonsense"}, {"certificate": None}]

    async def renew(channel: Any) -> bool:
        async def call(request: Any) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return bool(answers) and await home.renew(call, force=True)

    first = pem(home)
    site = hq.up_site(home, renew=renew)
    await hq.until(lambda: not answers or site.done())
    await hq.up("a")
    assert pem(home) == first and not site.done()
    assert (await hq.ask("a", "1")).meta["re"] == "1"


async def test_a_site_renews_its_own_certificate_only(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    await hq.enrol("b")
    for csr in (pki.make_csr(pki.new_key(), "b").decode(), "nonsense", None, 7):
        with pytest.raises(IntegrityError) as error:
            await call_unary(home.config.address, home.ca_pem, home.pair(), "Renew", {"csr": csr, "site": "b"})
        assert error.value.code == "csr.wrong"
    assert good(hq, pem(home))


async def test_an_expired_certificate_says_so_at_the_site(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    request = pki.make_csr(pki.load_key((home.folder / "tls.key").read_bytes()), "a")
    (home.folder / "tls.pem").write_bytes(hq.ca.issue_site(request, "a", dt.timedelta(hours=-1)))
    with pytest.raises(IntegrityError) as error:
        await hq.up_site(home)
    assert error.value.code == "certificate.expired" and error.value.remedy
    assert not hq.connected


async def test_enrolling_again_voids_what_was_before(headquarters: Any) -> None:
    hq = await headquarters().listen()
    old = await hq.enrol("a")
    hq.home.renew(hq.store, "a", {"csr": pki.make_csr(pki.new_key(), "a").decode()})
    older = hq.up_site(old)
    await hq.up("a")
    token = hq.invite("a")
    assert good(hq, pem(old))  # an invitation alone changes nothing
    new = await SiteHome.create(hq.folder / "anew", token, {})
    assert new.identity.public != old.identity.public
    assert good(hq, pem(new)) and not good(hq, pem(old))
    newer = hq.up_site(new)
    with pytest.raises(IntegrityError) as error:  # its connection is the newer one's, and there is no way back
        await asyncio.wait_for(older, PATIENCE_S)
    assert error.value.code in ("site.elsewhere", "certificate.revoked")
    with pytest.raises(IntegrityError) as error:
        await asyncio.wait_for(hq.up_site(old), PATIENCE_S)
    assert error.value.code == "certificate.revoked"
    assert not newer.done() and (await hq.ask("a", "1")).meta["re"] == "1"


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_coordinator_whose_clock_is_an_hour_off(headquarters: Any, hours: int) -> None:
    hq = await headquarters(skew=dt.timedelta(hours=hours)).listen()
    home = await hq.enrol("a")
    hq.up_site(home)
    await hq.up("a")
    assert (await hq.ask("a", "1")).meta["re"] == "1"
    first = pem(home)
    assert await home.renew(
        lambda request: call_unary(home.config.address, home.ca_pem, home.pair(), "Renew", request), force=True
    )
    assert pem(home) != first
    hq.transport.disconnect("a")
    await hq.until(lambda: len(hq.connected) == 2)
    assert (await hq.ask("a", "2")).meta["re"] == "2"
    assert not await home.renew(None)


# ---------------------------------------------------------------- with the whole server


async def test_revoking_closes_the_connection_and_keeps_it_closed(headquarters: Any, tmp_path: Path) -> None:
    """`atoll coordinator revoke` in another process, while coordinator and site are up."""
    hq = headquarters()
    (hq.home.folder / "listening.json").unlink(missing_ok=True)
    events: list[dict[str, Any]] = []
    server = asyncio.create_task(CoordinatorServer(hq.home, events.append).serve())
    await hq.until(lambda: (hq.home.folder / "listening.json").exists() or server.done())
    homes = {name: await hq.enrol(name) for name in ("a", "b")}
    states: dict[str, list[str]] = {name: [] for name in homes}
    sites = {name: asyncio.create_task(serve_site(home, states[name].append)) for name, home in homes.items()}
    await hq.until(lambda: all(row["seen"] for row in hq.store.sites().values()) and all(states.values()))
    hq.store.revoke("a")
    with pytest.raises(IntegrityError) as error:
        await asyncio.wait_for(sites["a"], PATIENCE_S)
    assert error.value.code == "certificate.revoked" and "invitation" in error.value.remedy
    with pytest.raises(IntegrityError) as error:  # nor at the next start
        await asyncio.wait_for(serve_site(homes["a"], print), PATIENCE_S)
    assert error.value.code == "certificate.revoked"
    assert not sites["b"].done() and states["b"] == ["connected"]
    again = await SiteHome.create(tmp_path / "again", hq.invite("a"), {})
    back = asyncio.create_task(serve_site(again, states["a"].append))
    await hq.until(lambda: states["a"].count("connected") == 2 or back.done())
    for task in (sites["b"], back, server):
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_certificate_is_not_replaced_by_nonsense(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    before = pem(home)

    async def nonsense(request: Any) -> Any:
        return {"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}

    with pytest.raises(ProtocolError):
        await home.renew(nonsense, force=True)
    assert pem(home) == before


# ---------------------------------------------------------------- clocks


async def test_the_coordinators_clock_says_when_a_certificate_is_renewed(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    assert not await home.renew(None, at=pki.now() + dt.timedelta(days=4))
    asked: list[Any] = []

    async def call(request: Any) -> Any:
        asked.append(request)
        return hq.home.renew(hq.store, "a", request)

    assert await home.renew(call, at=pki.now() + dt.timedelta(days=5)) and len(asked) == 1


@pytest.mark.parametrize(
    ("hours", "wanted"),
    [(0, ""), (-1, ""), (5, "5 hours ahead of"), (-30, "30 hours behind"), (960, "40 days ahead of")],
)
async def test_a_site_tells_that_its_clock_is_off(hours: float, wanted: str) -> None:
    states: list[str] = []
    site = GrpcSite("x:1", b"", lambda: (b"", b""), lambda *_: Message("", {}), max_message_bytes=1,
                    on_state=states.append)  # fmt: skip
    site._link = Link(site)
    hello = {"me": "c", "have": {}, "of": "", "holds": [], "time": time.time() - hours * 3600}
    site._link.attach(b"H" + bytes(16) + json.dumps(hello).encode())
    assert abs(site.coordinator_time() - time.time() + hours * 3600) < 60
    assert site._clocks_agree() == site._clocks_agree() == (not wanted)
    assert states == ([f"this site's clock is {wanted} the coordinator's: set it right"] if wanted else [])


@pytest.mark.parametrize("claimed", [None, "soon", -1, 1e300, [2]])
async def test_a_time_that_cannot_be_is_not_believed(claimed: Any) -> None:
    link = Link(None)  # type: ignore[arg-type]
    link.attach(b"H" + bytes(16) + json.dumps({"me": "c", "have": {}, "of": "", "holds": [], "time": claimed}).encode())
    assert abs(link.peer_time() - time.time()) < 60


@pytest.mark.parametrize(("own", "told"), [(5, 0), (5, -30), (0, 5), (0, -3), (0, 400)])
async def test_either_clock_renews_but_alone_not_at_every_check(
    headquarters: Any, monkeypatch: Any, own: int, told: int
) -> None:
    """In days after the certificate was made. Once both say so, it is renewed at once, and again."""
    hq = await headquarters().listen()
    home, begun, asked = await hq.enrol("a"), pki.now(), list[Any]()

    async def call(request: Any) -> Any:
        asked.append(request)
        if len(asked) == 1:
            raise TransportError("transport.unreachable", "the answer was lost")
        return {"certificate": first.decode()}

    first = pem(home)
    monkeypatch.setattr(pki, "now", lambda: begun + dt.timedelta(days=own))
    at = begun + dt.timedelta(days=told)
    with pytest.raises(TransportError):
        await home.renew(call, at=at)
    assert await home.renew(call, at=at)
    alone = told in range(5) or own == 0
    assert [await home.renew(call, at=at) for _ in range(3)] == [not alone] * 3
    monkeypatch.setattr(pki, "now", lambda: begun + dt.timedelta(days=5))
    assert await home.renew(call, at=begun + dt.timedelta(days=6))


async def test_a_renewal_that_is_refused_by_one_clock_waits_too(headquarters: Any) -> None:
    hq = await headquarters().listen()
    home, asked = await hq.enrol("a"), list[Any]()

    async def call(request: Any) -> Any:
        asked.append(request)
        raise IntegrityError("certificate.expired", "by the coordinator's clock")

    at = pki.now() + dt.timedelta(days=9)
    with pytest.raises(IntegrityError):
        await home.renew(call, at=at)
    assert not await home.renew(call, at=at) and len(asked) == 1


@pytest.mark.parametrize("hours", [0, 3, -960])
async def test_clocks_that_are_apart_hold_a_renewed_certificate_back_and_no_region(hours: int) -> None:
    """A region is to connect anew when its sites are back; a certificate is used once the clocks agree."""
    back, checks, apart = list[bool](), list[int](), [hours * 3600]
    site = GrpcSite("x:1", b"", lambda: (b"", b""), lambda *_: Message("", {}), max_message_bytes=1, check_s=0,
                    again=lambda: bool(back) and back.pop())  # fmt: skip
    site.coordinator_time = lambda: time.time() + apart[0]  # type: ignore[method-assign]

    async def renew(_: Any) -> bool:
        checks.append(len(checks))
        if len(checks) == 2 and hours:
            raise IntegrityError("certificate.expired", "refused by a clock that is off")
        if len(checks) == 5:
            apart[0] = 0
        return len(checks) == 1

    await asyncio.wait_for(site._renewed(None, renew), PATIENCE_S)  # type: ignore[arg-type]
    assert len(checks) == (6 if hours else 1), "what was renewed is not forgotten"
    checks, apart = [9], [hours * 3600]
    back.append(True)
    await asyncio.wait_for(site._renewed(None, renew), PATIENCE_S)  # type: ignore[arg-type]
    assert not back and checks == [9]
