"""One set of survivors, signed by enough sites; and what sites keep, and are sent, to that end.

Each site durably signs *one* set for each round. Two different sets of more than half of the sites have
a site in common, so a coordinator never has enough signatures for both (Bonawitz et al. 2017, Figure 4, round 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import DisclosureError, IntegrityError, ProtocolError, TransportError
from atoll.contract.protection import Party, Terms
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.identity import SIGNATURE_BYTES, verify
from atoll.crypto.prg import label
from atoll.privacy.secagg.graph import threshold

Bytes = NDArray[np.uint8]
AGREE = "agree"
"""The step in which survivors are agreed on."""
OF_RUN = "run: "
"""Marks what a site keeps to the end of the run; all else that it keeps is a round's."""


def quorum(terms: Terms) -> int:
    """How many of the round's cohort must sign a set of survivors."""
    return threshold(len(terms.cohort), terms.choice.adversary)


def enough(there: int, needed: int, step: str) -> None:
    """Raise TransportError where fewer than *needed* sites are left."""
    if there < needed:
        raise TransportError(
            "secagg.too-few", f"{there} sites are left, and {needed} are needed: the round ends, and nothing was told",
            field=step, remedy="bring the sites back and submit again",
        )  # fmt: skip


def survivors_of(terms: Terms, replied: Mapping[str, object]) -> Bytes:
    """Who *replied*, as every site is told it: one byte a site of the round's cohort."""
    return np.array([site in replied for site in terms.cohort], np.uint8)


def sign_survivors(party: Party, strangers: Sequence[str] = ()) -> dict[str, Array]:
    """At a site, step "agree": its signature on the set that it was told of. strangers: sites that cannot be in it.

    Raises ProtocolError for a set that cannot be, TransportError for too few, and DisclosureError where another
    set was signed before in this round.
    """
    terms, state, told = party.terms, party.state, party.sent.get("survivors")
    if told is None or told.shape != (len(terms.cohort),) or told.dtype != np.uint8:
        raise ProtocolError("secagg.survivors", "a set of survivors is malformed", field="survivors")
    survivors = _named(terms, told)
    unknown = [site for site in survivors if site in strangers]
    if party.name not in survivors or unknown:
        raise ProtocolError(
            "secagg.survivors", "a set of survivors lacks this site, or has one that never shared a key",
            field=", ".join(unknown) or party.name,
        )  # fmt: skip
    enough(len(survivors), max(quorum(terms), terms.min_sites), AGREE)
    names = array(hashlib.sha256(label("survivors", *survivors)).digest())  # another attempt may be of another cohort
    if "signed" in state and not np.array_equal(state["signed"], names):
        raise DisclosureError(
            "disclosure.cohort-differencing", "another set of survivors was signed before in this round",
            field=AGREE, remedy="bring the same sites back, or submit again",
        )  # fmt: skip
    party.commit(survivors)
    state["signed"], state["agreed"] = names, told.copy()
    return {"signature": array(party.sign(_claim(terms, told)))}


def check_agreed(party: Party, step: str) -> tuple[str, ...]:
    """At a site: the survivors, after checking that enough of them signed the very set that this site did."""
    terms, told = party.terms, party.state["agreed"]
    signatures = listed(party, "signatures", SIGNATURE_BYTES, terms.cohort)
    survivors = _named(terms, told)
    enough(len(signatures.keys() & set(survivors)), quorum(terms), step)
    for site, signature in signatures.items():
        check_signed(terms, site, signature.tobytes(), _claim(terms, told))
    return survivors


def check_signed(terms: Terms, site: str, signature: bytes, about: bytes) -> None:
    """Raise IntegrityError unless *site*'s approved identity signed *about*."""
    try:
        verify(terms.roster[site], signature, about)
    except IntegrityError:
        raise IntegrityError(
            "secagg.signature", "what a site is said to have signed for this round does not verify", field=site,
            remedy="it is an old key, or the coordinator changed it: compare both parties' ledgers",
        ) from None  # fmt: skip


def _named(terms: Terms, told: Array) -> tuple[str, ...]:
    return tuple(site for site, there in zip(terms.cohort, told, strict=True) if there)


def _claim(terms: Terms, told: Array) -> bytes:
    return label("atoll secagg survivors 1", *terms.label(), told.tobytes())


# ---------------------------------------------------------------- what a site keeps of a round


def begin(party: Party) -> None:
    """Forget earlier rounds; of this one's earlier attempts only which survivors were signed. Raises ProtocolError
    for a round and attempt that was begun before."""
    state, terms = party.state, party.terms
    if _at(state) >= [terms.round, terms.attempt]:
        raise _out_of_order()
    forget(state, {"signed"} if _at(state)[:1] == [terms.round] else set())
    state["at"] = np.array([terms.round, terms.attempt])


def begun(party: Party, has: str) -> dict[str, Array]:
    """The state of this very round and attempt; raises ProtocolError for a step out of order."""
    state, terms = party.state, party.terms
    if has not in state or _at(state) != [terms.round, terms.attempt]:
        raise _out_of_order()
    return state


def forget(state: dict[str, Array], but: set[str]) -> None:
    """What is a round's in a site's state, except for some."""
    for name in [name for name in state if name not in but and not name.startswith(OF_RUN)]:
        del state[name]


def _at(state: Mapping[str, Array]) -> list[int]:
    """The round and attempt that a state is of."""
    return state["at"].tolist() if "at" in state else []


def _out_of_order() -> ProtocolError:
    return ProtocolError(
        "secagg.order", "a step of secure aggregation came out of order", field="step",
        remedy="the coordinator does not keep the protocol, or the round was begun anew: submit again",
    )  # fmt: skip


# ---------------------------------------------------------------- rows of bytes by site


def array(data: bytes) -> Bytes:
    """*data* as an array."""
    return np.frombuffer(data, np.uint8)


def byte_rows(*shape: int) -> Field:
    """The field of so many bytes."""
    return Field("|u1", shape, 255, 1)


def dense(name: str, size: int, order: Sequence[str], found: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """One row for each site of *order*, zeros for those without, and which those are."""
    rows = np.zeros((len(order), size), np.uint8)
    for i, site in enumerate(order):
        if site in found:
            rows[i] = found[site]
    return {name: rows, f"{name} of": np.array([site in found for site in order], np.uint8)}


def listed(party: Party, name: str, size: int, order: Sequence[str]) -> dict[str, Bytes]:
    """Inverse of :func:`dense`, for what came with the task; raises ProtocolError for other shapes."""
    rows, there = party.sent.get(name), party.sent.get(f"{name} of")
    shapes = rows is not None and there is not None and (rows.shape, there.shape) == ((len(order), size), (len(order),))
    if rows is None or there is None or not shapes or rows.dtype != np.uint8:
        raise ProtocolError("secagg.malformed", "what the coordinator sent for a step is malformed", field=name)
    return {site: rows[i] for i, site in enumerate(order) if there[i]}
