"""The federation's CA: its certificates are believed by other implementations, its tokens by nobody when altered."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError
from atoll.crypto import pki
from atoll.crypto.pki import CertificateAuthority, JoinToken

HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority.create("test")


def issue(ca: CertificateAuthority, name: str = "north", lifetime: dt.timedelta = pki.SITE_LIFETIME) -> bytes:
    return ca.issue_site(pki.make_csr(pki.new_key(), name), name, lifetime)


def loaded(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def verify_client(ca: CertificateAuthority, pem: bytes, at: dt.datetime | None = None) -> list[x509.GeneralName]:
    policy = PolicyBuilder().store(Store([ca.certificate])).time(at or pki.now())
    return list(policy.build_client_verifier().verify(loaded(pem), []).subjects or [])


def verify_server(ca: CertificateAuthority, pem: bytes, host: str, at: dt.datetime | None = None) -> None:
    policy = PolicyBuilder().store(Store([ca.certificate])).time(at or pki.now())
    policy.build_server_verifier(x509.DNSName(host)).verify(loaded(pem), [])


# ---------------------------------------------------------------- certificates


def test_a_sites_certificate_verifies(ca: CertificateAuthority) -> None:
    pem = issue(ca)
    assert verify_client(ca, pem) == [x509.UniformResourceIdentifier("atoll://site/north")]
    assert pki.site_name(loaded(pem)) == "north"
    assert pki.read_site_certificate(pem, ca) == ("north", pki.certificate_fingerprint(pem))


def test_the_servers_certificate_verifies_for_its_hosts_only(ca: CertificateAuthority) -> None:
    key, pem = ca.issue_server(["coordinator.example", "localhost"])
    verify_server(ca, pem, "coordinator.example")
    verify_server(ca, pem, "localhost")
    with pytest.raises(VerificationError):
        verify_server(ca, pem, "other.example")
    assert pki.load_key(key).public_key() == loaded(pem).public_key()


def test_addresses_are_named_as_addresses(ca: CertificateAuthority) -> None:
    _, pem = ca.issue_server(["127.0.0.1", "::1", "example.org"])
    names = loaded(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.DNSName) == ["example.org"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["atoll://coordinator"]


def test_a_certificate_is_good_for_one_purpose(ca: CertificateAuthority) -> None:
    _, server = ca.issue_server(["localhost"])
    with pytest.raises(VerificationError):
        verify_client(ca, server)
    with pytest.raises(VerificationError):
        verify_server(ca, issue(ca, "localhost"), "localhost")
    for pem, purpose in [(server, ExtendedKeyUsageOID.SERVER_AUTH), (issue(ca), ExtendedKeyUsageOID.CLIENT_AUTH)]:
        assert list(loaded(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not loaded(pem).extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(IntegrityError):
        pki.read_site_certificate(server, ca)
    with pytest.raises(IntegrityError):
        pki.site_name(ca.certificate)


def test_a_certificate_of_another_ca_is_foreign(ca: CertificateAuthority) -> None:
    other = CertificateAuthority.create("test")  # the same name, another key
    foreign = issue(other)
    with pytest.raises(VerificationError):
        verify_client(ca, foreign)
    with pytest.raises(IntegrityError) as error:
        pki.read_site_certificate(foreign, ca)
    assert error.value.code == "certificate.foreign"
    for pem in (b"", b"text", ca.pem, other.pem):
        with pytest.raises(IntegrityError):
            pki.read_site_certificate(pem, ca)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")
def test_openssl_believes_the_chain(ca: CertificateAuthority, tmp_path: Path) -> None:
    files = {"ca": ca.pem, "site": issue(ca), "server": ca.issue_server(["localhost"])[1]}
    files["foreign"] = issue(CertificateAuthority.create("test"))
    for name, pem in files.items():
        (tmp_path / f"{name}.pem").write_bytes(pem)

    def openssl(name: str, *options: str) -> bool:
        command = ["openssl", "verify", "-x509_strict", *options, "-CAfile", "ca.pem", f"{name}.pem"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0

    assert openssl("site", "-purpose", "sslclient") and not openssl("site", "-purpose", "sslserver")
    assert openssl("server", "-purpose", "sslserver", "-verify_hostname", "localhost")
    assert not openssl("server", "-verify_hostname", "other.example")
    assert not openssl("server", "-purpose", "sslclient") and not openssl("foreign")


def test_a_site_cannot_issue_certificates(ca: CertificateAuthority) -> None:
    key = pki.new_key()
    site = loaded(ca.issue_site(pki.make_csr(key, "north"), "north"))
    forged = issue(CertificateAuthority(key, site), "south")
    policy = PolicyBuilder().store(Store([ca.certificate])).time(pki.now())
    with pytest.raises(VerificationError):
        policy.build_client_verifier().verify(loaded(forged), [site])
    with pytest.raises(IntegrityError):
        pki.read_site_certificate(forged, ca)


@pytest.mark.parametrize("skew", [-HOUR, -119 * HOUR / 60, HOUR, dt.timedelta()])
def test_a_clock_an_hour_off_is_harmless(ca: CertificateAuthority, skew: dt.timedelta) -> None:
    at = pki.now() + skew
    verify_client(ca, issue(ca), at)
    verify_server(ca, ca.issue_server(["localhost"])[1], "localhost", at)


@pytest.mark.parametrize("skew", [-3 * HOUR, pki.SITE_LIFETIME + HOUR])
def test_a_certificate_is_not_good_for_ever(ca: CertificateAuthority, skew: dt.timedelta) -> None:
    pem = issue(ca)
    with pytest.raises(VerificationError):
        verify_client(ca, pem, pki.now() + skew)
    assert not pki.expired(pem)
    assert pki.expired(issue(ca, lifetime=dt.timedelta(seconds=-1)))


def test_serial_numbers_differ(ca: CertificateAuthority) -> None:
    assert len({loaded(issue(ca)).serial_number for _ in range(20)}) == 20


# ---------------------------------------------------------------- signing requests


@pytest.mark.parametrize("name", ["south", "Norh", "north2", "nort"])
def test_a_request_for_another_name_is_refused(ca: CertificateAuthority, name: str) -> None:
    with pytest.raises(IntegrityError) as error:
        ca.issue_site(pki.make_csr(pki.new_key(), name), "north")
    assert error.value.code == "csr.wrong"


def test_any_altered_byte_of_a_request_is_refused(ca: CertificateAuthority) -> None:
    """The key, the name or the signature: nothing can be exchanged under way.

    But for the count of unused bits before the signature, which carries nothing.
    """
    request = x509.load_pem_x509_csr(pki.make_csr(pki.new_key(), "north"))
    der = request.public_bytes(Encoding.DER)
    unused_bits = len(der) - len(request.signature) - 1
    for place in set(range(len(der))) - {unused_bits}:
        altered = bytearray(der)
        altered[place] ^= 1
        pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(altered))
        with pytest.raises(IntegrityError):
            ca.issue_site(pem + b"-----END CERTIFICATE REQUEST-----\n", "north")


def test_requests_that_are_none(ca: CertificateAuthority) -> None:
    for pem in (b"", b"text", b"\xff\xfe", ca.pem, pki.key_pem(pki.new_key())):
        with pytest.raises(IntegrityError):
            ca.issue_site(pem, "north")


def test_a_request_with_two_names_or_another_kind_of_key_is_refused(ca: CertificateAuthority) -> None:
    def request(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, *names: str) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
        made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
        return made.public_bytes(Encoding.PEM)

    ca.issue_site(request(pki.new_key(), "north"), "north")
    for pem in (
        request(pki.new_key(), "north", "south"),
        request(pki.new_key(), "south", "north"),
        request(pki.new_key()),
        request(ed25519.Ed25519PrivateKey.generate(), "north"),
        request(ec.generate_private_key(ec.SECP384R1()), "north"),
    ):
        with pytest.raises(IntegrityError):
            ca.issue_site(pem, "north")


def test_what_a_request_asks_for_is_not_granted(ca: CertificateAuthority) -> None:
    """Names and rights come from the CA alone."""
    key = pki.new_key()
    wish = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("atoll://coordinator")])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")]))
        .add_extension(wish, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = loaded(ca.issue_site(csr.public_bytes(Encoding.PEM), "north"))
    assert pki.site_name(made) == "north"
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("atoll://site/north")]


@pytest.mark.parametrize(
    "name",
    ["", "North", "n/../s", "north south", "coordinator", "a" * 64, ".north", "-x", "nörth", "north\n", "north\0"],
)
def test_names_that_name_no_site(ca: CertificateAuthority, name: str) -> None:
    with pytest.raises(IntegrityError):
        pki.check_name(name)
    with pytest.raises(IntegrityError):
        JoinToken.create(name, "localhost:1", ca, DAY)
    if name and "\0" not in name:
        with pytest.raises((IntegrityError, ValueError)):
            ca.issue_site(pki.make_csr(pki.new_key(), name), name)


def test_names_that_do() -> None:
    for name in ("a", "0", "north", "site-1", "st.mary_2", "a" * 63):
        assert pki.check_name(name) == name


# ---------------------------------------------------------------- keeping and renewing


def test_other_keys_are_no_tls_keys() -> None:
    key = pki.new_key()
    assert pki.load_key(pki.key_pem(key)).public_key() == key.public_key()
    for pem in (b"", b"text", pki.key_pem(key)[:100], pki.key_pem(ec.generate_private_key(ec.SECP384R1()))):
        with pytest.raises(IntegrityError) as error:
            pki.load_key(pem, "ca.key")
        assert (error.value.code, error.value.field) == ("key.type", "ca.key")


def test_a_ca_survives_on_disk(ca: CertificateAuthority, tmp_path: Path) -> None:
    ca.save(tmp_path)
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600
    again = CertificateAuthority.load(tmp_path)
    verify_client(ca, issue(again))
    verify_client(again, issue(ca))
    with pytest.raises(FileExistsError):
        CertificateAuthority.create("other").save(tmp_path)
    assert CertificateAuthority.load(tmp_path).pem == ca.pem
    (tmp_path / "ca.key").chmod(0o640)
    with pytest.raises(IntegrityError):
        CertificateAuthority.load(tmp_path)


@pytest.mark.parametrize("lifetime", [DAY, 7 * DAY, 398 * DAY])
def test_renewal_begins_when_a_third_is_left(ca: CertificateAuthority, lifetime: dt.timedelta) -> None:
    pem = issue(ca, lifetime=lifetime)
    begun = pki.now()
    assert not pki.needs_renewal(pem)
    assert not pki.needs_renewal(pem, begun + lifetime * 0.66)
    assert pki.needs_renewal(pem, begun + lifetime * 0.67)
    assert pki.needs_renewal(pem, begun + lifetime * 2)
    assert not pki.needs_renewal(pem, begun - HOUR)
    assert pki.needs_renewal(pem, begun - 3 * HOUR), "a clock that was ahead made it"


# ---------------------------------------------------------------- join tokens


@pytest.fixture(scope="module")
def token(ca: CertificateAuthority) -> JoinToken:
    return JoinToken.create("north", "coordinator.example:7444", ca, DAY)


def test_a_token_survives_the_journey(ca: CertificateAuthority, token: JoinToken) -> None:
    text = token.encode()
    assert JoinToken.decode(text) == token == JoinToken.decode(f"  {text}\n")
    assert "\n" not in text and " " not in text and text.startswith("atoll-join-1.")
    assert token.ca_pem == ca.pem and token.ca_fingerprint == pki.cert_fingerprint(ca.certificate)
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    assert JoinToken.decode(wrapped) == token


def test_secrets_are_secret(ca: CertificateAuthority, token: JoinToken) -> None:
    assert len(base64.urlsafe_b64decode(token.secret + "=")) == 32
    assert len({JoinToken.create("north", "x:1", ca, DAY).secret for _ in range(20)}) == 20
    stored = pki.secret_hash(token.secret)
    assert len(stored) == 64 and token.secret not in stored and stored != pki.secret_hash("other")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_altered_character_is_found(token: JoinToken, data: st.DataObject) -> None:
    text = token.encode()
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="ascii") | st.characters(exclude_categories=["Cs"]))
    altered = text[:place] + other + text[place + 1 :]
    try:
        assert JoinToken.decode(altered) == token  # such as another spelling of the last character's unused bits
    except IntegrityError as error:
        assert error.code in ("token.malformed", "name.malformed")
        assert token.secret not in str(error)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cut_or_doubled_part_is_found(token: JoinToken, data: st.DataObject) -> None:
    text = token.encode()
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    for altered in (text[:start] + text[stop:], text[:stop] + text[start:]):
        with pytest.raises(IntegrityError):
            JoinToken.decode(altered)


def spelled(body: object) -> str:
    """A token with a right checksum over any content."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = hashlib.sha256(content).digest()[: pki.CHECKSUM_BYTES] + content
    return JoinToken.PREFIX + base64.urlsafe_b64encode(content).decode().rstrip("=")


def test_tokens_that_are_none(ca: CertificateAuthority, token: JoinToken) -> None:
    text = token.encode()
    raw = text[len(JoinToken.PREFIX) :]
    whole = json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4))[pki.CHECKSUM_BYTES :])
    assert JoinToken.decode(spelled(whole)) == token
    other_ca = CertificateAuthority.create("evil")
    wrong: list[object] = [{k: v for k, v in whole.items() if k != key} for key in whole]
    wrong += [{**whole, key: value} for key in ("ca", "ca_sha256", "expires") for value in (None, "", [], {}, "é")]
    wrong += [{**whole, "ca": base64.b64encode(other_ca.certificate.public_bytes(Encoding.DER)).decode()}]
    wrong += [{**whole, "expires": float("inf")}, {**whole, "expires": float("nan")}, {**whole, "site": "../north"}]
    wrong += [[], 5, None, b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
    for text in ["", "atoll-join-1.", "atoll-join-2." + raw, raw, "é" + raw, *map(spelled, wrong)]:
        with pytest.raises(IntegrityError):
            JoinToken.decode(text)


def test_an_expired_token_is_refused(ca: CertificateAuthority) -> None:
    with pytest.raises(IntegrityError) as error:
        JoinToken.decode(JoinToken.create("north", "x:1", ca, -3 * HOUR).encode())
    assert error.value.code == "token.expired" and error.value.remedy
    # the site's clock may be an hour off; the coordinator's own decides
    JoinToken.decode(JoinToken.create("north", "x:1", ca, -HOUR).encode())
