"""Join tokens against a real coordinator: what does not fit is refused, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from atoll.contract.errors import AtollError, IntegrityError, PlanError, ProtocolError, TransportError
from atoll.crypto import pki
from atoll.crypto.identity import Identity
from atoll.data.sources import SourceSpec
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome, SiteHome
from atoll.transport.grpc_channel import call_unary


def changed(token: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """The token with another content, well spelled."""
    body = pki.JoinToken.PREFIX, token.removeprefix(pki.JoinToken.PREFIX)
    content = json.loads(base64.urlsafe_b64decode(body[1] + "=" * (-len(body[1]) % 4))[pki.CHECKSUM_BYTES :])
    change(content)
    raw = json.dumps(content).encode()
    raw = hashlib.sha256(raw).digest()[: pki.CHECKSUM_BYTES] + raw
    return body[0] + base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def is_refused(folder: Path, token: str, code: str, kind: type[AtollError] = IntegrityError) -> None:
    """Joining fails with *code*, a remedy, and an empty folder."""
    with pytest.raises(kind) as error:
        await SiteHome.create(folder, token, {})
    assert error.value.code == code and error.value.remedy
    assert not folder.exists() or not list(folder.iterdir())


async def test_a_token_enrols_its_site_once(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    token = hq.invite("a")
    home = await SiteHome.create(tmp_path / "a", token, {})
    assert (home.config.name, home.config.address) == ("a", hq.address)
    assert home.config.coordinator_key == hq.home.identity.public.hex()
    assert hq.store.roster() == {"a": home.identity.public.hex()}
    for name in ("tls.key", "identity.key"):
        assert stat.S_IMODE((home.folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    hq.up_site(home)
    await hq.up("a")
    await is_refused(tmp_path / "again", token, "token.refused")
    assert hq.store.roster() == {"a": home.identity.public.hex()}
    assert (await hq.ask("a", "1")).meta["re"] == "1"


async def test_of_several_who_use_one_token_at_once_one_gets_in(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    token = hq.invite("a")
    tries = [SiteHome.create(tmp_path / str(n), token, {}) for n in range(5)]
    made = await asyncio.gather(*tries, return_exceptions=True)
    homes = [one for one in made if isinstance(one, SiteHome)]
    assert len(homes) == 1 and hq.store.roster() == {"a": homes[0].identity.public.hex()}
    assert {one.code for one in made if isinstance(one, AtollError)} == {"token.refused"}
    assert len(made) == 5 and sum(isinstance(one, IntegrityError) for one in made) == 4


@pytest.mark.parametrize("minutes", [-1, -180])
async def test_an_expired_token(headquarters: Any, tmp_path: Path, minutes: int) -> None:
    """Long ago: the site says so. A moment ago, which may be the clocks' difference: the coordinator does."""
    hq = await headquarters().listen()
    await is_refused(tmp_path / "a", hq.invite("a", dt.timedelta(minutes=minutes)), "token.expired")
    assert not hq.store.roster()
    await SiteHome.create(tmp_path / "a", hq.invite("a"), {})


async def test_a_token_for_another_name(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    token = hq.invite("a")
    hq.invite("b")
    for name in ("b", "c"):
        await is_refused(
            tmp_path / name, changed(token, lambda body, name=name: body.update(site=name)), "token.refused"
        )
    for name in ("../x", "Upper", "coordinator", "", "a\n"):
        told = changed(token, lambda body, name=name: body.update(site=name))
        await is_refused(tmp_path / "x", told, "name.malformed")
    assert not hq.store.roster()
    await SiteHome.create(tmp_path / "a", token, {})


async def test_a_later_invitation_voids_the_earlier_one(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    first, second = hq.invite("a"), hq.invite("a")
    await is_refused(tmp_path / "a", first, "token.refused")
    await SiteHome.create(tmp_path / "a", second, {})


async def test_a_token_of_a_revoked_site(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    token = hq.invite("a")
    hq.store.revoke("a")
    await is_refused(tmp_path / "a", token, "token.refused")
    await SiteHome.create(tmp_path / "a", hq.invite("a"), {})
    assert set(hq.store.roster()) == {"a"}


async def test_an_altered_ca(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters().listen()
    token = hq.invite("a")
    other = pki.CertificateAuthority.create("test").certificate
    other_der = base64.b64encode(other.public_bytes(Encoding.DER)).decode()
    fingerprint = pki.cert_fingerprint(other)
    await is_refused(tmp_path / "a", changed(token, lambda body: body.update(ca_sha256=fingerprint)), "token.malformed")
    await is_refused(tmp_path / "a", changed(token, lambda body: body.update(ca=other_der)), "token.malformed")
    both = changed(token, lambda body: body.update(ca=other_der, ca_sha256=fingerprint))
    await is_refused(tmp_path / "a", both, "tls.wrong-authority")
    await SiteHome.create(tmp_path / "a", token, {})  # the secret was not given away: the token is good still


async def test_the_coordinator_of_another_federation(headquarters: Any, tmp_path: Path) -> None:
    """It listens at the address in the token: its certificate gives it away before the secret is sent."""
    hq, other = await headquarters().listen(), await headquarters(federation="other").listen()
    other.store.invite("a", pki.secret_hash("x"), 2**31 - 1)
    token = changed(hq.invite("a"), lambda body: body.update(address=f"127.0.0.1:{other.enrol_port}"))
    await is_refused(tmp_path / "a", token, "tls.wrong-authority")
    assert not other.store.roster() and not hq.store.roster()


async def test_a_coordinator_under_another_name(headquarters: Any, tmp_path: Path) -> None:
    hq = await headquarters(host="localhost").listen()
    token = hq.invite("a")
    by_number = changed(token, lambda body: body.update(address=f"127.0.0.1:{hq.enrol_port}"))
    await is_refused(tmp_path / "a", by_number, "tls.wrong-name")
    await SiteHome.create(tmp_path / "a", token, {})


async def test_a_coordinator_with_an_ipv6_address(headquarters: Any) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    hq = headquarters(host="::1")
    hq.host = "::1"
    await hq.listen()
    home = await hq.enrol("a")
    assert home.config.address == f"[::1]:{hq.port}"
    hq.up_site(home)
    await hq.up("a")


@pytest.mark.slow
async def test_a_coordinator_that_is_not_there(headquarters: Any, tmp_path: Path) -> None:
    token = headquarters().invite("a")
    await is_refused(
        tmp_path / "a",
        changed(token, lambda b: b.update(address="127.0.0.1:1")),
        "transport.unreachable",
        TransportError,
    )


async def test_a_folder_that_is_in_use(headquarters: Any, tmp_path: Path) -> None:
    """It is looked at before the token is used up."""
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    half = tmp_path / "half"
    half.mkdir()
    Identity.generate("b").save(half / "identity.key")
    token = hq.invite("b")
    before = {path: path.read_bytes() for folder in (home.folder, half) for path in folder.iterdir()}
    for folder in (home.folder, half):
        with pytest.raises(PlanError) as error:
            await SiteHome.create(folder, token, {})
        assert error.value.code == "home.exists"
    assert {path: path.read_bytes() for folder in (home.folder, half) for path in folder.iterdir()} == before
    with pytest.raises(PlanError):
        CoordinatorHome.create(hq.home.folder, CoordinatorConfig())
    await SiteHome.create(tmp_path / "b", token, {})


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"certificate": "x", "port": 1, "coordinator_key": "0" * 64},
        {"port": 1, "coordinator_key": "0" * 64}, "certificate without port", "certificate without key",
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_leaves_nothing(net: Any, tmp_path: Path, answer: Any) -> None:
    def enrol(_: str, request: Any) -> Any:
        if isinstance(answer, dict):
            return answer
        certificate = net.ca.issue_site(request["csr"].encode(), "a").decode()
        more = {"port": "1", "coordinator_key": "0" * 64} if "port" in answer else {"port": 1, "coordinator_key": "0"}
        return {"certificate": certificate, **more}

    await net.start(enrol=enrol)
    token = pki.JoinToken.create("a", f"127.0.0.1:{net.enrol_port}", net.ca, dt.timedelta(hours=1))
    with pytest.raises(ProtocolError) as error:
        await SiteHome.create(tmp_path / "a", token.encode(), {})
    assert error.value.code == "enrol.malformed" and not list((tmp_path / "a").iterdir())


# ---------------------------------------------------------------- requests by hand


def csr(key: Any, name: str = "a") -> str:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return made.public_bytes(Encoding.PEM).decode()


PUBLIC = "ab" * 32
GOOD_CSR = csr(pki.new_key())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"secret": "guess"}, "token.refused"), ({"site": "b", "csr": csr(pki.new_key(), "b")}, "token.refused"),
        ({"site": "b"}, "csr.wrong"), ({"csr": csr(pki.new_key(), "b")}, "csr.wrong"), ({"csr": "no"}, "csr.wrong"),
        ({"csr": csr(rsa.generate_private_key(65537, 2048))}, "csr.wrong"),
        ({"csr": csr(ed25519.Ed25519PrivateKey.generate())}, "csr.wrong"),
        ({"csr": GOOD_CSR.replace("A", "B", 5)}, "csr.wrong"),
        ({"public_key": "zz" * 32}, "enrol.key"), ({"public_key": "ab" * 31}, "enrol.key"),
        ({"public_key": "AB" * 32}, "enrol.key"), ({"public_key": "ab " * 32}, "enrol.key"),
        ({"public_key": ""}, "enrol.key"), ({"public_key": None}, "enrol.malformed"),
        ({"csr": None}, "enrol.malformed"), ({"secret": 7}, "enrol.malformed"), ({"site": ["a"]}, "enrol.malformed"),
        ({"site": "../a"}, "name.malformed"),
    ],
)  # fmt: skip
async def test_a_request_that_does_not_fit_is_refused_and_uses_nothing_up(
    headquarters: Any, change: dict[str, Any], code: str
) -> None:
    hq = await headquarters().listen()
    token = pki.JoinToken.decode(hq.invite("a"))
    hq.invite("b")
    request = {"site": "a", "secret": token.secret, "csr": GOOD_CSR, "public_key": PUBLIC}
    with pytest.raises(IntegrityError) as error:
        await call_unary(token.address, token.ca_pem, None, "Enrol", {**request, **change})
    assert error.value.code == code and not hq.store.roster()
    answer = await call_unary(token.address, token.ca_pem, None, "Enrol", request)
    assert pki.read_site_certificate(answer["certificate"].encode(), hq.ca)[0] == "a"
    assert hq.store.roster() == {"a": PUBLIC}


def test_only_p256_requests_are_signed() -> None:
    ca = pki.CertificateAuthority.create("test")
    for curve in (ec.SECP384R1(), ec.SECP521R1()):
        with pytest.raises(IntegrityError):
            ca.issue_site(csr(ec.generate_private_key(curve)).encode(), "a")


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_requests_with_flipped_bytes_are_refused() -> None:
    ca = pki.CertificateAuthority.create("test")
    good = x509.load_pem_x509_csr(GOOD_CSR.encode())
    right = good.public_bytes(Encoding.DER)
    for place in range(len(right)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            der = bytearray(right)
            der[place] ^= mask
            text = base64.encodebytes(bytes(der)).decode()
            made = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"
            try:
                ca.issue_site(made.encode(), "a")
            except IntegrityError as error:
                assert error.code == "csr.wrong"
            else:  # unused bits of the signature's last byte: what is signed is the same
                assert x509.load_pem_x509_csr(made.encode()).tbs_certrequest_bytes == good.tbs_certrequest_bytes


async def test_a_site_comes_back_with_its_identity(headquarters: Any) -> None:
    """After its certificate has expired or was revoked: same identity, journal and data, new certificate."""
    hq = await headquarters().listen()
    home = await hq.enrol("a")
    kept = {name: (home.folder / name).read_bytes() for name in ("identity.key", "policy.yaml")}
    old = {name: (home.folder / name).read_bytes() for name in ("tls.key", "tls.pem")}
    hq.store.revoke("a")
    again = await SiteHome.create(home.folder, hq.invite("a"), {"more": SourceSpec(path="more.csv")})
    assert again.identity.public == home.identity.public
    assert set(again.config.datasets) == {*home.config.datasets, "more"}
    assert kept == {name: (home.folder / name).read_bytes() for name in kept}
    assert all((home.folder / name).read_bytes() != content for name, content in old.items())
    assert (home.folder / "tls.key").stat().st_mode & 0o777 == 0o600
    assert hq.store.roster() == {"a": home.identity.public.hex()}


async def test_ports_are_read_whole_while_they_are_written(headquarters: Any) -> None:
    """An invitation made as the coordinator starts never names a port that nobody listens on."""
    home = headquarters().home
    home.listen_on(1, 2)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [home.listen_on(1, 2) for _ in range(150)])
        while not writing.done():
            assert home.listening() == (1, 2)
    writing.result()


async def test_a_sites_folder_is_read_whole_while_it_joins_again(headquarters: Any) -> None:
    """Or after that was killed: there is no site that cannot even join anew."""
    hq = headquarters()

    async def signed(*asked: Any) -> Any:
        return hq.home.enrol(hq.store, asked[-1])

    folder = hq.folder / "a"
    await SiteHome.create(folder, hq.invite("a"), {}, call=signed)
    with ThreadPoolExecutor(1) as pool:

        def again() -> None:
            for _ in range(15):
                asyncio.run(SiteHome.create(folder, hq.invite("a"), {}, call=signed))

        joining = pool.submit(again)
        while not joining.done():
            assert SiteHome(folder).config.name == "a" and SiteHome(folder).ca_pem == hq.ca.pem
    joining.result()
