"""secagg: secure aggregation by pairwise and self masks that survives dropouts within the round.

Source: Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS), Figure 4,
with its consistency check against an active coordinator; above 64 sites on the sparse graph of Bell et al. 2020.

Parties: the sites of the approved roster, and the coordinator, which relays everything. Sites have identities
(Ed25519) that their operators compared, and a session key (X25519) each for this run, signed by them.
Messages, four exchanges a round:
 shares   each site makes a mask key and a self-mask seed, signs the key (and a commitment to the seed), and seals a
          Shamir share of both for every neighbour.
 reply    each site adds to its fixed-point vector the self mask and, for each neighbour that answered, plus or minus
          the pair's mask (X25519 → HKDF with run, roster, round, attempt and pair → AES-CTR). The masked vector leaves.
 agree    the coordinator says whose vectors arrived: the survivors. Each site durably signs *one* such set.
 unmask   shown enough signatures on that same set, each site opens one share for each neighbour: of the self
          mask of a survivor, of the mask key of one that dropped out. Never both.
What each party learns: the coordinator the sum over the survivors and who they are; nobody anything else. A share or
key that does not match what was signed is refused.
Threat model: curious coordinator and fewer than the threshold t of colluding sites, t > n/2; active coordinator,
t > 2n/3. Sites may send wrong vectors: the sum is then wrong, within its bounds. n is the roster's size, so that a
coordinator cannot split the cohort in parts that it sums one by one. The colluding learn the sum over the others.
Dropout: at any step down to the threshold the survivors' sum comes out of the same round. A vector that arrives after
the set is signed stays hidden: only its pair masks are known. A round begun anew has new keys, and a site signs the
same set for it as before, or none: two sums of one round could be subtracted.
Cost: the fixed-point vector once, 0.2 KB and a share of 92 bytes per neighbour a site; masks for degree + 1 vectors a
site; five round trips with the handler's.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import DisclosureError, IntegrityError, ProtocolError, TransportError
from atoll.contract.protection import REPLY, Choice, Estimate, Exchange, Party, Replies, Terms
from atoll.contract.rounds import Field, Round, Summed
from atoll.contract.wire import Array
from atoll.crypto import shamir
from atoll.crypto.identity import SIGNATURE_BYTES, verify
from atoll.crypto.prg import KEY_BYTES, Stream, derive, fresh_key, label, mask_bytes_s
from atoll.crypto.session import SEAL_BYTES, SIGNED_BYTES, Session, check_claim
from atoll.privacy.secagg.graph import degree, holders, neighbours, threshold
from atoll.privacy.secagg.group import Group, Ring

Bytes = NDArray[np.uint8]
ADVERT_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES
"""A mask key, a commitment to the self-mask seed, and the identity's signature of both."""
SHARE_BYTES = 2 * KEY_BYTES
SEALED_BYTES = SHARE_BYTES + SEAL_BYTES
PEER_S = 1e-3
"""About what one neighbour costs a site in keys, envelopes and signatures."""
OF_RUN = "run: "
"""Marks what a site keeps to the end of the run; all else that it keeps is a round's."""


class SecAgg:
    """See the module's docstring."""

    name = "secagg"
    reveals = False
    attempts = True
    capabilities = Capabilities(
        "protection 'secagg'", needs=frozenset({"bounded", "resolution"}), offers=frozenset({"sum"})
    )

    def open_group(
        self, fields: Mapping[str, Field], sites: Sequence[str], terms: Terms
    ) -> Generator[Exchange, Replies, Group]:
        """Where replies of *fields* are added up, at the coordinator, which may have to ask *sites* for it."""
        yield from ()
        return Ring(fields, len(terms.roster))

    def join_group(self, fields: Mapping[str, Field], party: Party) -> Group:
        """The same at a site, which is asked for its reply."""
        return Ring(fields, len(party.terms.roster))

    def estimate(self, fields: Mapping[str, Field], num_sites: int, choice: Choice) -> Estimate:
        """Masks for every neighbour, and two key agreements and three signatures' checks with each."""
        around = degree(num_sites, choice.adversary)
        vector = sum(field.size_bytes for field in Ring(fields, num_sites).declared().values())
        each = SEALED_BYTES * 2 + SIGNED_BYTES + ADVERT_BYTES + SIGNATURE_BYTES + KEY_BYTES
        return Estimate(vector * (around + 1) / mask_bytes_s() + around * PEER_S, vector + around * each, 4)

    # ---------------------------------------------------------------- the coordinator

    def combine(
        self, asked: Round, sites: Sequence[str], terms: Terms, sessions: Mapping[str, bytes]
    ) -> Generator[Exchange, Replies, Summed]:
        """shares → reply → agree → unmask, each asked of those that answered the last."""
        group = yield from self.open_group(asked.reply, sites, terms)
        around, names = neighbours(terms), tuple(terms.roster)
        width, needed = len(around[names[0]]), threshold(len(names), terms.choice.adversary)
        here = {site: _array(sessions[site]) for site in sites if site in sessions}

        shared = yield Exchange(
            "shares", tuple(here), {"advert": _bytes(ADVERT_BYTES), "sealed": _bytes(width, SEALED_BYTES)},
            send_to={site: _dense("sessions", SIGNED_BYTES, around[site], here) for site in here},
        )  # fmt: skip
        _enough(len(shared), needed, "shares")
        adverts = {site: reply.array("advert").copy() for site, reply in shared.items()}
        sealed = {site: dict(zip(around[site], reply.array("sealed"), strict=True)) for site, reply in shared.items()}

        told = {}
        for site in adverts:
            told[site] = _dense("adverts", ADVERT_BYTES, around[site], adverts)
            envelopes = {other: sealed[other][site] for other in around[site] if other in sealed}
            told[site] |= _dense("sealed", SEALED_BYTES, around[site], envelopes)
        replies = yield Exchange(REPLY, tuple(adverts), group.declared(), group.told, told)
        _enough(len(replies), max(needed, terms.min_sites), REPLY)
        total = yield from group.total(replies)

        survivors = np.array([site in replies for site in names], np.uint8)
        agreed = yield Exchange(
            "agree", tuple(replies), {"signature": _bytes(SIGNATURE_BYTES)}, {"survivors": survivors}
        )
        _enough(len(agreed), needed, "agree")
        signatures = {site: reply.array("signature").copy() for site, reply in agreed.items()}
        opened = yield Exchange(
            "unmask", tuple(agreed), {"shares": _bytes(width + 1, KEY_BYTES)},
            _dense("signatures", SIGNATURE_BYTES, names, signatures),
        )  # fmt: skip

        shares: dict[str, dict[int, bytes]] = {site: {} for site in adverts}
        for site, reply in opened.items():
            for holder, row in zip((site, *around[site]), reply.array("shares"), strict=True):
                if holder in adverts:
                    shares[holder][holders(holder, around[holder])[site]] = row.tobytes()
        plus, minus = _left_over(terms, around, adverts, set(replies), shares)
        group.add_masks(total, plus, minus)
        return Summed(group.decode(total, len(replies)), tuple(replies))

    # ---------------------------------------------------------------- the site

    def answer(self, step: str, party: Party, reply: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """One of the four steps, in their order."""
        if step == REPLY:
            return self._masked(party, self.join_group(fields, party), reply)
        steps = {"shares": self._shares, "agree": self._agree, "unmask": self._unmask}
        if step not in steps:
            raise ProtocolError("secagg.order", "secure aggregation has no such step", field=step)
        return steps[step](party)

    def _shares(self, party: Party) -> dict[str, Array]:
        """Fresh secrets, signed, and a share of them for every neighbour that is there."""
        terms, state = party.terms, party.state
        around = neighbours(terms)[party.name]
        others = _listed(party, "sessions", SIGNED_BYTES, around)
        if _at(state) >= [terms.round, terms.attempt]:
            raise _out_of_order()
        private, seed, needed = Session.fresh(), fresh_key(), _needed(around, terms)
        _enough(len(others) + 1, needed, "shares")
        number = holders(party.name, around)
        split = shamir.split(private + seed, needed, [number[site] for site in (party.name, *others)])
        _forget(state, {"signed"} if _at(state)[:1] == [terms.round] else set())
        state |= {"at": np.array([terms.round, terms.attempt]), "own": _array(split[number[party.name]])}
        state |= {"private": _array(private), "seed": _array(seed)}
        envelopes = {}
        for other, session in others.items():
            key = check_claim(session.tobytes(), terms.run, terms.roster_hash, other, terms.roster[other])
            about = label("share", *terms.label(party.name, other))
            envelopes[other] = _array(party.session.seal(key, about, split[number[other]]))
            state[f"session {other}"] = _array(key)
        public = Session(private).public + _commitment(seed)
        advert = public + party.sign(_advert(terms, party.name, public))
        return {"advert": _array(advert), "sealed": _dense("sealed", SEALED_BYTES, around, envelopes)["sealed"]}

    def _masked(self, party: Party, group: Group, reply: Mapping[str, Array]) -> dict[str, Array]:
        """The vector under its masks; keeps what neighbours shared, and forgets its own secrets."""
        terms, state = party.terms, _begun(party, "private")
        around = neighbours(terms)[party.name]
        adverts = _listed(party, "adverts", ADVERT_BYTES, around)
        envelopes = _listed(party, "sealed", SEALED_BYTES, around)
        _enough(len(adverts) + 1, _needed(around, terms), REPLY)
        key, plus, minus = Session(state["private"].tobytes()), list[Stream](), list[Stream]()
        plus.append(_self_mask(state["seed"].tobytes(), terms))
        for other, advert in adverts.items():
            public, signature = advert[:-SIGNATURE_BYTES].tobytes(), advert[-SIGNATURE_BYTES:].tobytes()
            _check_signed(terms, other, signature, _advert(terms, other, public))
            session = state.get(f"session {other}")
            if session is None:
                raise ProtocolError("secagg.order", "a neighbour was not there when shares were made", field=other)
            about = label("share", *terms.label(other, party.name))
            state[f"share {other}"] = _array(party.session.unseal(session.tobytes(), about, envelopes[other].tobytes()))
            mask = Stream(key.pair(public[:KEY_BYTES], *terms.label("mask")))
            (plus if party.name < other else minus).append(mask)
        vectors = group.masked(reply, plus, minus)
        for name in ("private", "seed", *(name for name in state if name.startswith("session "))):
            del state[name]
        return vectors

    def _agree(self, party: Party) -> dict[str, Array]:
        """Sign the one set of survivors."""
        terms, state = party.terms, _begun(party, "own")
        if "private" in state or "agreed" in state:
            raise ProtocolError("secagg.order", "survivors are agreed on once, after the replies", field="agree")
        told = party.sent.get("survivors")
        if told is None or told.shape != (len(terms.roster),) or told.dtype != np.uint8:
            raise ProtocolError("secagg.survivors", "a set of survivors is malformed", field="survivors")
        survivors = [site for site, there in zip(terms.roster, told, strict=True) if there]
        around = neighbours(terms)[party.name]
        strangers = [site for site in survivors if site in around and f"share {site}" not in state]
        if party.name not in survivors or strangers:
            raise ProtocolError(
                "secagg.survivors", "a set of survivors lacks this site, or has one that never shared a key",
                field=", ".join(strangers) or party.name,
            )  # fmt: skip
        needed = max(threshold(len(terms.roster), terms.choice.adversary), terms.min_sites)
        _enough(len(survivors), needed, "agree")
        if "signed" in state and not np.array_equal(state["signed"] != 0, told != 0):
            raise DisclosureError(
                "disclosure.cohort-differencing", "another set of survivors was signed before in this round",
                field="agree", remedy="bring the same sites back, or submit again",
            )  # fmt: skip
        party.commit(survivors)
        state["signed"] = state["agreed"] = told.copy()
        return {"signature": _array(party.sign(_survivors(terms, told)))}

    def _unmask(self, party: Party) -> dict[str, Array]:
        """One share for every neighbour, after enough sites signed the same set."""
        terms, state = party.terms, _begun(party, "agreed")
        signatures = _listed(party, "signatures", SIGNATURE_BYTES, tuple(terms.roster))
        survivors = {site for site, there in zip(terms.roster, state["agreed"], strict=True) if there}
        _enough(len(signatures.keys() & survivors), threshold(len(terms.roster), terms.choice.adversary), "unmask")
        about = _survivors(terms, state["agreed"])
        for site, signature in signatures.items():
            _check_signed(terms, site, signature.tobytes(), about)
        shares = [state["own"][KEY_BYTES:]]
        for other in neighbours(terms)[party.name]:
            share = state.get(f"share {other}", np.zeros(SHARE_BYTES, np.uint8))
            shares.append(share[KEY_BYTES:] if other in survivors else share[:KEY_BYTES])
        _forget(state, {"at", "signed"})
        return {"shares": np.stack(shares)}


# ---------------------------------------------------------------- keys, and what is signed


def _advert(terms: Terms, site: str, public: bytes) -> bytes:
    return label("atoll secagg advert 1", *terms.label(site), public)


def _survivors(terms: Terms, told: Array) -> bytes:
    return label("atoll secagg survivors 1", *terms.label(), told.tobytes())


def _self_mask(seed: bytes, terms: Terms) -> Stream:
    return Stream(derive(seed, "self mask", *terms.label()))


def _commitment(seed: bytes) -> bytes:
    return derive(seed, "commitment")


def _check_signed(terms: Terms, site: str, signature: bytes, about: bytes) -> None:
    try:
        verify(terms.roster[site], signature, about)
    except IntegrityError:
        raise IntegrityError(
            "secagg.signature", "what a site is said to have signed for this round does not verify", field=site,
            remedy="it is an old key, or the coordinator changed it: compare both parties' ledgers",
        ) from None  # fmt: skip


# ---------------------------------------------------------------- counting, and taking masks off


def _needed(around: Sequence[str], terms: Terms) -> int:
    """The threshold of one site's shares: among itself and its neighbours."""
    return threshold(len(around) + 1, terms.choice.adversary)


def _enough(there: int, needed: int, step: str) -> None:
    if there < needed:
        raise TransportError(
            "secagg.too-few", f"{there} sites are left, and {needed} are needed: the round ends, and nothing was told",
            field=step, remedy="bring the sites back and submit again",
        )  # fmt: skip


def _left_over(
    terms: Terms, around: Mapping[str, Sequence[str]], adverts: Mapping[str, Bytes], survivors: set[str],
    shares: Mapping[str, Mapping[int, bytes]],
) -> tuple[list[Stream], list[Stream]]:  # fmt: skip
    """The masks that do not cancel in the survivors' sum: (those to be added, those to be subtracted)."""
    plus, minus = list[Stream](), list[Stream]()
    for site, advert in adverts.items():
        public, commitment = advert[:KEY_BYTES].tobytes(), advert[KEY_BYTES : 2 * KEY_BYTES].tobytes()
        needed = _needed(around[site], terms)
        if site in survivors:
            minus.append(_self_mask(_recovered(shares[site], needed, commitment, _commitment), terms))
            continue
        key = Session(_recovered(shares[site], needed, public, lambda private: Session(private).public))
        for other in around[site]:
            if other in survivors:
                mask = Stream(key.pair(adverts[other][:KEY_BYTES].tobytes(), *terms.label("mask")))
                (minus if other < site else plus).append(mask)
    return plus, minus


def _recovered(shares: Mapping[int, bytes], needed: int, known: bytes, public: Callable[[bytes], bytes]) -> bytes:
    """The secret whose *public* side is *known*; one wrong share among more than are needed does no harm."""
    numbers = sorted(shares)
    _enough(len(numbers), needed, "unmask")
    for start in range(len(numbers) if len(numbers) > needed else 1):
        chosen = (numbers[start:] + numbers[:start])[:needed]
        secret = shamir.combine({number: shares[number] for number in chosen})
        if hmac.compare_digest(public(secret), known):
            return secret
    raise IntegrityError(
        "secagg.bad-share",
        "a site's secret does not come out of the shares: one of them is wrong",
        field="unmask",
        remedy="submit again without the site that does not keep the protocol; the ledgers say who sent what",
    )


# ---------------------------------------------------------------- rows of bytes by site


def _array(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def _bytes(*shape: int) -> Field:
    return Field("|u1", shape, 255, 1)


def _dense(name: str, size: int, order: Sequence[str], found: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """One row for each site of *order*, zeros for those without, and which those are."""
    rows = np.zeros((len(order), size), np.uint8)
    for i, site in enumerate(order):
        if site in found:
            rows[i] = found[site]
    return {name: rows, f"{name} of": np.array([site in found for site in order], np.uint8)}


def _listed(party: Party, name: str, size: int, order: Sequence[str]) -> dict[str, Bytes]:
    """Inverse of :func:`_dense`, for what came with the task; raises ProtocolError for other shapes."""
    rows, there = party.sent.get(name), party.sent.get(f"{name} of")
    shapes = rows is not None and there is not None and (rows.shape, there.shape) == ((len(order), size), (len(order),))
    if rows is None or there is None or not shapes or rows.dtype != np.uint8:
        raise ProtocolError("secagg.malformed", "what the coordinator sent for a step is malformed", field=name)
    return {site: rows[i] for i, site in enumerate(order) if there[i]}


def _at(state: Mapping[str, Array]) -> list[int]:
    """The round and attempt that a state is of."""
    return state["at"].tolist() if "at" in state else []


def _forget(state: dict[str, Array], but: set[str]) -> None:
    """What is a round's in a site's state, except for some."""
    for name in [name for name in state if name not in but and not name.startswith(OF_RUN)]:
        del state[name]


def _begun(party: Party, has: str) -> dict[str, Array]:
    """The state of this very round and attempt; raises ProtocolError for a step out of order."""
    state, terms = party.state, party.terms
    if has not in state or _at(state) != [terms.round, terms.attempt]:
        raise _out_of_order()
    return state


def _out_of_order() -> ProtocolError:
    return ProtocolError(
        "secagg.order", "a step of secure aggregation came out of order", field="step",
        remedy="the coordinator does not keep the protocol, or the round was begun anew: submit again",
    )  # fmt: skip
