"""Who may connect, and to whom a site connects: real certificates against a real server."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from atoll.contract.errors import IntegrityError, TransportError
from atoll.contract.wire import Message
from atoll.crypto import pki
from atoll.transport.grpc_channel import SERVICE, call_unary

HOUR = dt.timedelta(hours=1)
PATIENCE_S = 120.0


async def is_kept_out(net: Any, site: str, **join: Any) -> None:
    """The coordinator's TLS refuses *site* again and again, and serves the others."""
    kept_out = net.join(site, **join)
    await net.until(lambda: len(net.states[site]) >= 2 or kept_out.done())
    assert not kept_out.done() and set(net.states[site]) == {"disconnected"}
    assert site not in net.connected and site not in net.transport.sites()
    kept_out.cancel()
    net.join("good")
    await net.up("good")
    assert (await net.ask("good", "1", {"x": np.ones(3)})).arrays["x"].sum() == 3


# ---------------------------------------------------------------- at the coordinator


async def test_without_a_certificate_there_is_no_connection(net: Any) -> None:
    await net.start()
    async with grpc.aio.secure_channel(net.address, grpc.ssl_channel_credentials(net.ca.pem)) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Connect")()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(call.read(), PATIENCE_S)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(TransportError):
        await call_unary(net.address, net.ca.pem, None, "Renew", {}, deadline_s=0.5)
    assert not net.transport.sites() and not net.connected


async def test_without_tls_there_is_no_connection(net: Any) -> None:
    await net.start()
    for port in (net.port, net.enrol_port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{SERVICE}/Enrol")(b"{}", timeout=PATIENCE_S)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_a_foreign_ca_is_refused(net: Any) -> None:
    await net.start()
    foreign = pki.CertificateAuthority.create("test")  # of the same name
    await is_kept_out(net, "a", pair=net.pair("a", ca=foreign))


async def test_an_expired_certificate_is_refused(net: Any) -> None:
    await net.start()
    await is_kept_out(net, "a", pair=net.pair("a", -HOUR))


async def test_a_self_signed_certificate_is_refused(net: Any) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(net.ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(pki.now() - HOUR)
        .not_valid_after(pki.now() + HOUR)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("atoll://site/a")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    await net.start()
    await is_kept_out(net, "a", pair=(pki.key_pem(key), certificate.public_bytes(Encoding.PEM)))


async def test_a_certificate_without_its_key_is_useless(net: Any) -> None:
    await net.start()
    stolen = net.pair("a")[1]
    with pytest.raises((IntegrityError, TransportError, grpc.aio.AioRpcError)):
        await call_unary(net.address, net.ca.pem, (pki.key_pem(pki.new_key()), stolen), "Renew", {}, deadline_s=1)
    assert not net.connected


async def test_a_site_cannot_issue_certificates(net: Any) -> None:
    """A site's own certificate as an intermediate CA's."""
    key, certificate = net.pair("a")
    below = pki.CertificateAuthority(pki.load_key(key), x509.load_pem_x509_certificate(certificate))
    own_key, issued = net.pair("b", ca=below)
    await net.start()
    await is_kept_out(net, "b", pair=(own_key, issued + certificate))


async def test_the_coordinators_certificate_is_no_sites(net: Any) -> None:
    await net.start()
    await is_kept_out(net, "a", pair=net.ca.issue_server(["127.0.0.1"]))


async def test_a_site_cannot_act_as_another(net: Any) -> None:
    """Whatever it calls itself: who it is comes from its certificate."""
    await net.start()
    task = net.join("b", pair=net.pair("a"))
    await net.until(lambda: net.connected)
    assert set(net.transport.sites()) == {"a"} and net.connected == ["a"]
    with pytest.raises(TransportError) as error:
        await net.ask("b", "1", deadline_s=0.3)
    assert error.value.where["site"] == "b"
    assert (await net.ask("a", "2")).meta["re"] == "2"
    assert not task.done()


# ---------------------------------------------------------------- revoked


async def test_revoked_before_connecting(net: Any) -> None:
    await net.start()
    net.refused.add("a")
    with pytest.raises(IntegrityError) as error:
        await asyncio.wait_for(net.join("a"), PATIENCE_S)
    assert error.value.code == "certificate.revoked" and error.value.remedy
    with pytest.raises(IntegrityError) as error:
        await call_unary(net.address, net.ca.pem, net.pair("a"), "Renew", {})
    assert error.value.code == "certificate.revoked"
    assert not net.connected


async def test_revoked_while_connected(net: Any) -> None:
    await net.start()
    sites = {name: net.join(name) for name in ("a", "b")}
    await net.up("a", "b")
    asking = asyncio.create_task(net.ask("a", "1", {"x": np.zeros(10_000_000)}, deadline_s=1.0))
    await asyncio.sleep(0)
    net.refused.add("a")
    net.transport.disconnect("a")
    with pytest.raises(IntegrityError) as error:
        await asyncio.wait_for(sites["a"], PATIENCE_S)
    assert error.value.code == "certificate.revoked" and error.value.remedy
    assert set(net.transport.sites()) == {"b"}
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), TransportError) or asking.result()
    net.sites = [(name, task) for name, task in net.sites if name == "b"]
    await net.ask("b", "2")


async def test_a_revoked_site_that_stays_silent_is_cut_off_too(net: Any) -> None:
    """It neither reads nor closes its end; the coordinator is done with it all the same."""
    await net.start()
    credentials = grpc.ssl_channel_credentials(net.ca.pem, *net.pair("a"))
    async with grpc.aio.secure_channel(net.address, credentials) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Connect")()
        await call.write(b"H" + bytes(16) + b'{"me":"x","have":{},"of":"","holds":[]}')
        await net.until(lambda: "a" in net.connected)
        asking = asyncio.create_task(net.ask("a", "1", {"x": np.zeros(10_000_000)}, deadline_s=1.0))
        await asyncio.sleep(0)
        net.refused.add("a")
        net.transport.disconnect("a")
        await net.until(lambda: not net.transport.sites())
        with pytest.raises(TransportError):
            await asking


# ---------------------------------------------------------------- at the site


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (lambda net: net.ca.issue_server(["example.org", "127.0.0.2"]), "tls.wrong-name"),
        (lambda net: net.ca.issue_server(["127.0.0.1"], -HOUR), "tls.clock"),
        (lambda net: pki.CertificateAuthority.create("test").issue_server(["127.0.0.1"]), "tls.wrong-authority"),
        (lambda net: net.pair("b"), "tls.wrong-authority"),  # another site poses as the coordinator
    ],
    ids=["another name", "expired", "another authority", "another site"],
)
async def test_a_site_connects_to_its_coordinator_only(net: Any, made: Any, code: str) -> None:
    served: list[Message] = []
    pair = made(net)
    await net.start(lambda: pair)
    with pytest.raises(IntegrityError) as error:
        await asyncio.wait_for(net.join("a", lambda message, _: served.append(message)), PATIENCE_S)  # type: ignore[arg-type]
    assert error.value.code == code and error.value.remedy
    for address in (net.address, f"127.0.0.1:{net.enrol_port}"):
        with pytest.raises(IntegrityError) as error:
            await call_unary(address, net.ca.pem, None, "Enrol", {"secret": "s"})
        assert error.value.code == code
    assert not net.connected and not served


async def test_the_server_may_be_reached_by_each_of_its_names(net: Any) -> None:
    await net.start()
    net.join("a", address=f"localhost:{net.port}")
    net.join("b", address=f"127.0.0.1:{net.port}")
    await net.up("a", "b")


async def test_the_servers_certificate_is_renewed_while_it_listens(net: Any) -> None:
    pairs = [net.ca.issue_server(["127.0.0.1"], -HOUR), net.ca.issue_server(["127.0.0.1"])]
    shown: list[int] = []

    def current() -> tuple[bytes, bytes]:
        shown.append(1)
        return pairs[-1]

    await net.start(current)
    net.join("a")
    await net.up("a")
    before = len(shown)
    pairs.append(net.ca.issue_server(["127.0.0.1"]))
    net.join("b")
    await net.up("a", "b")
    assert len(shown) > before and net.connected.count("a") == 1
