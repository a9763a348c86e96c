"""The federation's own certificate authority, join tokens and certificates (X.509, RFC 5280).

TLS keys are ECDSA P-256 (what every TLS stack accepts); a party's name stands in the
subject alternative name as the URI ``atoll://site/NAME`` or ``atoll://coordinator``.
Certificates are short-lived and start two hours early, so that a clock an hour off is
harmless.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import check_private, write_private

CURVE = ec.SECP256R1()
SITE_LIFETIME = dt.timedelta(days=7)
CA_LIFETIME = dt.timedelta(days=3650)
EARLY = dt.timedelta(hours=2)
CHECKSUM_BYTES = 8
UNREADABLE = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion)
"""What `cryptography` raises for certificates and requests that it cannot read or believe."""

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


def check_name(name: str) -> str:
    """*name* if it can name a site, else IntegrityError."""
    if not NAME.fullmatch(name) or name == "coordinator":
        raise IntegrityError(
            "name.malformed",
            "a site's name must be 1–63 of a-z 0-9 _ . - and not 'coordinator'",
            field="name",
            remedy="choose another name",
        )
    return name


def now() -> dt.datetime:
    """The current time, UTC."""
    return dt.datetime.now(dt.UTC)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(CURVE)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 PEM without passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A certificate signing request (PEM); the key itself never leaves the site."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def cert_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER certificate, hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def certificate_fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of a PEM certificate's DER form, hex."""
    return cert_fingerprint(x509.load_pem_x509_certificate(certificate_pem))


def load_key(pem: bytes, field: str = "tls.key") -> ec.EllipticCurvePrivateKey:
    """A P-256 key from PKCS #8 PEM; raises IntegrityError for any other."""
    try:
        key = load_pem_private_key(pem, None)
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != CURVE.name:
        raise IntegrityError("key.type", f"{field} is not a P-256 key", field=field)
    return key


def clock() -> str:
    """What this machine's clock says, as it is told in errors."""
    return f"{now():%Y-%m-%d %H:%M} UTC"


def expired(certificate_pem: bytes) -> bool:
    """True once the certificate's end has passed."""
    return now() > x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc


def read_site_certificate(certificate_pem: bytes, ca: CertificateAuthority) -> tuple[str, str]:
    """(site, SHA-256 fingerprint) of a client certificate that *ca* itself issued; raises IntegrityError."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        certificate.verify_directly_issued_by(ca.certificate)
    except UNREADABLE:
        raise IntegrityError("certificate.foreign", "the certificate is not of this federation's CA") from None
    return site_name(certificate), cert_fingerprint(certificate)


def site_name(certificate: x509.Certificate) -> str:
    """The site a certificate was issued to; raises IntegrityError when it is not a site's."""
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            for uri in extension.value.get_values_for_type(x509.UniformResourceIdentifier):
                if uri.startswith("atoll://site/"):
                    return uri.removeprefix("atoll://site/")
    raise IntegrityError("certificate.not-a-site", "the certificate was not issued to a site")


class CertificateAuthority:
    """The coordinator's CA: issues its own server certificate and the sites' client certificates."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate
        self.pem = certificate.public_bytes(Encoding.PEM)

    @staticmethod
    def create(federation: str) -> CertificateAuthority:
        """A new self-signed CA, valid ten years, allowed to issue end-entity certificates only."""
        key = new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} Atoll CA")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - EARLY)
            .not_valid_after(now() + CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return CertificateAuthority(key, certificate)

    @staticmethod
    def load(folder: Path) -> CertificateAuthority:
        """Read ca.key (0600) and ca.pem from *folder*."""
        key = load_key(check_private(folder / "ca.key"), "ca.key")
        return CertificateAuthority(key, x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()))

    def save(self, folder: Path) -> None:
        """Write ca.key (0600) and ca.pem into *folder*."""
        write_private(folder / "ca.key", key_pem(self._key))
        (folder / "ca.pem").write_bytes(self.pem)

    def issue_site(self, csr_pem: bytes, name: str, lifetime: dt.timedelta = SITE_LIFETIME) -> bytes:
        """A client certificate (PEM) for site *name* from its CSR.

        Raises IntegrityError when the CSR is malformed, not self-signed, or for another name.
        """
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
            public, common = csr.public_key(), csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            right = csr.is_signature_valid and [attribute.value for attribute in common] == [check_name(name)]
        except UNREADABLE:
            right, public = False, None
        if not right or not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != CURVE.name:
            raise IntegrityError("csr.wrong", "the signing request is malformed or for another name", field="csr")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"atoll://site/{name}")]
        return self._issue(public, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, lifetime)

    def issue_server(self, hosts: Sequence[str], lifetime: dt.timedelta = SITE_LIFETIME) -> tuple[bytes, bytes]:
        """The coordinator's TLS key and certificate (PEM, PEM) for *hosts* (names or addresses)."""
        key = new_key()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier("atoll://coordinator")]
        for host in hosts:
            try:
                names.append(x509.IPAddress(ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        pem = self._issue(key.public_key(), "coordinator", names, ExtendedKeyUsageOID.SERVER_AUTH, lifetime)
        return key_pem(key), pem

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey,
        common_name: str,
        names: list[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
        lifetime: dt.timedelta,
    ) -> bytes:
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - EARLY)
            .not_valid_after(now() + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def needs_renewal(certificate_pem: bytes, at: dt.datetime | None = None) -> bool:
    """True once less than a third of the certificate's lifetime is left, and while it is none yet, as one that was made
    by a clock that was ahead."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    start, end = certificate.not_valid_before_utc + EARLY, certificate.not_valid_after_utc
    return not start - EARLY <= (at or now()) <= end - (end - start) / 3


# ---------------------------------------------------------------- join tokens


def secret_hash(secret: str) -> str:
    """What the coordinator stores instead of a token's secret (256 random bits need no salt)."""
    return hashlib.sha256(b"atoll join 1\0" + secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A one-time, expiring invitation.

    It carries the CA certificate (and so its fingerprint), which the site trusts from then on,
    where to enrol, the site's name and a 256-bit secret, of which the coordinator keeps only
    the SHA-256.
    """

    site: str
    address: str
    ca_pem: bytes
    expires: int
    secret: str

    PREFIX = "atoll-join-1."

    @staticmethod
    def create(site: str, address: str, ca: CertificateAuthority, lifetime: dt.timedelta) -> JoinToken:
        """A token for *site*; *address* is host:port of the enrolment service."""
        expires = int((now() + lifetime).timestamp())
        return JoinToken(check_name(site), address, ca.pem, expires, secrets.token_urlsafe(32))

    @property
    def ca_fingerprint(self) -> str:
        """SHA-256 of the CA certificate (hex), to be compared out of band."""
        return cert_fingerprint(x509.load_pem_x509_certificate(self.ca_pem))

    def encode(self) -> str:
        """As one line of text, with a checksum against slips in copying."""
        ca_der = x509.load_pem_x509_certificate(self.ca_pem).public_bytes(Encoding.DER)
        body = {
            "site": self.site,
            "address": self.address,
            "ca": base64.b64encode(ca_der).decode(),
            "ca_sha256": self.ca_fingerprint,
            "expires": self.expires,
            "secret": self.secret,
        }
        content = json.dumps(body).encode()
        content = hashlib.sha256(content).digest()[:CHECKSUM_BYTES] + content
        return self.PREFIX + base64.urlsafe_b64encode(content).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> JoinToken:
        """Inverse of :meth:`encode`; raises IntegrityError for anything else or an expired token."""
        try:
            text = "".join(text.split())
            head, raw = text[: len(JoinToken.PREFIX)], text[len(JoinToken.PREFIX) :]
            if head != JoinToken.PREFIX:
                raise ValueError
            content = base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4))
            checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
            if hashlib.sha256(content).digest()[:CHECKSUM_BYTES] != checksum:
                raise ValueError
            body = json.loads(content)
            certificate = x509.load_der_x509_certificate(base64.b64decode(body["ca"], validate=True))
            if not secrets.compare_digest(cert_fingerprint(certificate), str(body["ca_sha256"])):
                raise ValueError
            token = JoinToken(
                check_name(str(body["site"])),
                str(body["address"]),
                certificate.public_bytes(Encoding.PEM),
                int(body["expires"]),
                str(body["secret"]),
            )
        except (*UNREADABLE, KeyError, OverflowError, RecursionError):
            raise IntegrityError(
                "token.malformed", "this is not a join token", field="token", remedy="copy the whole line again"
            ) from None
        if token.expires + EARLY.total_seconds() < now().timestamp():
            raise IntegrityError(
                "token.expired", f"by this machine's clock, {clock()}, the join token has expired", field="token",
                remedy="if the clock is right, ask for a new invitation",
            )  # fmt: skip
        return token
