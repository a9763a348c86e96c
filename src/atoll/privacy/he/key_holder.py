"""The key holder: the one site that makes a run's key, and alone can decrypt.

The plan names it (``protection.key_holder``), or it is the first by name that answers. It makes the key when it is
first asked, keeps the private part in its journal until the run ends, and signs the public part by its identity for
this run and roster. The coordinator passes that on; every site checks who signed it before it encrypts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atoll.contract.errors import IntegrityError, PlanError, ProtocolError, TransportError
from atoll.contract.protection import Exchange, Party, Replies, Terms
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.identity import SIGNATURE_BYTES, verify
from atoll.crypto.prg import label
from atoll.privacy.secagg.agreement import OF_RUN

KEY, DECRYPT = "key", "decrypt"
"""The steps that a key holder answers."""


@dataclass(frozen=True, slots=True)
class PublicKeyOf:
    """A verified public key, and the site that signed it."""

    holder: str
    data: bytes
    told: Mapping[str, Array]
    """As the coordinator passes it on."""


def open_key(
    scheme: str, sites: Sequence[str], terms: Terms, declared: Field
) -> Generator[Exchange, Replies, PublicKeyOf]:
    """At the coordinator: the key of the plan's key holder, or of the first of *sites*, by name, that answers.

    declared: the public key's bytes. Raises PlanError for a key holder that is none of the roster's sites,
    TransportError ``he.key-holder-gone`` when nobody answers, and IntegrityError for another's key.
    """
    named = terms.choice.key_holder
    if named and named not in terms.roster:
        raise PlanError(
            "he.no-such-site", "the plan's key holder is not among the run's sites", field="protection.key_holder",
            remedy=f"name one of {', '.join(terms.roster)}, or none",
        )  # fmt: skip
    fields = {"key": declared, "signature": Field("|u1", (SIGNATURE_BYTES,), 255, 1)}
    for site in sorted(sites):
        if named in ("", site):
            keyed = yield Exchange(KEY, (site,), fields)
            if site in keyed:
                number = np.array(list(terms.roster).index(site))
                sent = {"key": keyed[site].array("key").copy(), "signature": keyed[site].array("signature").copy()}
                told = {"public key": sent["key"], "key signature": sent["signature"], "key holder": number}
                return _checked(scheme, terms, site, told)
    raise gone(KEY)


def publish(scheme: str, party: Party, make: Callable[[], tuple[bytes, bytes]]) -> dict[str, Array]:
    """At the key holder, step "key": the run's public key, signed. make: a fresh (private, public) pair."""
    if party.terms.choice.key_holder not in ("", party.name):
        raise ProtocolError("he.not-key-holder", "the plan names another key holder", field=KEY)
    private, public = f"{OF_RUN}{scheme} private key", f"{OF_RUN}{scheme} public key"
    if private not in party.state:
        made = make()
        party.state[private], party.state[public] = (np.frombuffer(part, np.uint8) for part in made)
    data = party.state[public]
    signature = party.sign(claim(scheme, party.terms.run, party.terms.agreed, party.name, data.tobytes()))
    return {"key": data, "signature": np.frombuffer(signature, np.uint8)}


def private_key(scheme: str, party: Party) -> bytes:
    """What :func:`publish` kept; raises ProtocolError at a site that is not the key holder."""
    kept = party.state.get(f"{OF_RUN}{scheme} private key")
    if kept is None:
        raise ProtocolError("he.not-key-holder", "this site has made no key in this run", field=DECRYPT)
    return kept.tobytes()


def join_key(scheme: str, party: Party) -> PublicKeyOf:
    """At a site: the public key that came with the request. Raises ProtocolError or IntegrityError unless the plan's
    key holder, or without one any site of the roster, signed it for this run."""
    sent, terms = party.sent, party.terms
    number = sent.get("key holder")
    if number is None or number.shape != () or number.dtype.kind != "i" or not 0 <= int(number) < len(terms.roster):
        raise ProtocolError("he.malformed", "a request names no key holder of the roster", field="key holder")
    return _checked(scheme, terms, list(terms.roster)[int(number)], sent)


def gone(step: str) -> TransportError:
    """Nobody can decrypt what was encrypted."""
    return TransportError(
        "he.key-holder-gone", "the site that holds the run's key is gone: the round ends, and nothing was told",
        field=step, remedy="bring it back and submit again, or name another in the plan: protection.key_holder",
    )  # fmt: skip


def _checked(scheme: str, terms: Terms, holder: str, told: Mapping[str, Array]) -> PublicKeyOf:
    key, signature = told.get("public key"), told.get("key signature")
    if key is None or signature is None or key.dtype != np.uint8 or signature.dtype != np.uint8:
        raise ProtocolError("he.malformed", "a request comes without a public key", field="public key")
    if terms.choice.key_holder not in ("", holder):
        raise ProtocolError("he.not-key-holder", "the public key is not of the plan's key holder", field=holder)
    data = key.tobytes()
    try:
        verify(terms.roster[holder], signature.tobytes(), claim(scheme, terms.run, terms.agreed, holder, data))
    except IntegrityError:
        raise IntegrityError(
            "he.key-signature", "a public key is not signed by its holder's approved identity for this run",
            field=holder, remedy="it is an old key, or the coordinator changed it: compare both parties' ledgers",
        ) from None  # fmt: skip
    return PublicKeyOf(holder, data, told)


def claim(scheme: str, run: str, agreed: str, holder: str, public: bytes) -> bytes:
    """What an identity signs of a public key: it is *holder*'s, in this run, by this plan among this roster."""
    return label("atoll he key 1", scheme, run, agreed, holder, public)
