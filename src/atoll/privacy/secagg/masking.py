"""secagg: secure aggregation by pairwise and self masks that survives dropouts within the round.

Source: Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS), Figure 4,
with its consistency check against an active coordinator; above 64 sites on the sparse graph of Bell et al. 2020.

Parties: the sites of the approved roster, and the coordinator, which relays everything. Sites have identities
(Ed25519) that their operators compared, and a session key (X25519) each for this run, signed by them.
Messages, four exchanges a round:
 shares   each site makes a mask key and a self-mask seed, signs the key (and a commitment to the seed), and seals a
          Shamir share of both for every neighbour.
 reply    each site adds to its fixed-point vector the self mask and, for each neighbour that answered, plus or minus
          the pair's mask (X25519 → HKDF with run, roster, round, cohort and pair → AES-CTR). The masked vector leaves.
 agree    the coordinator says whose vectors arrived: the survivors. Each site durably signs *one* such set.
 unmask   shown enough signatures on that same set, each site opens one share for each neighbour: of the self
          mask of a survivor, of the mask key of one that dropped out. Never both.
What each party learns: the coordinator the sum over the survivors and who they are; nobody anything else. A share or
key that does not match what was signed is refused.
Threat model: curious coordinator and fewer than the threshold t of colluding sites, t > n/2; active coordinator,
t > 2n/3. Sites may send wrong vectors: the sum is then wrong, within its bounds, or refused. n is the size of the
round's cohort: the roster, or where the plan leads to sums among some (draws, groups, who is ready), these, and sites
refuse fewer than the plan leads to: a coordinator cannot split a cohort in parts that it sums one by one. The colluding
learn the sum over the others.
Dropout: at any step down to the threshold the survivors' sum comes out of the same round. A vector that arrives after
the set is signed stays hidden: only its pair masks are known. A round begun anew has new keys, and a site signs the
same set for it as before, or none: two sums of one round could be subtracted.
Cost: the fixed-point vector once, 0.2 KB and a share of 92 bytes per neighbour a site; masks for degree + 1 vectors a
site; four round trips, the handler's among them.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import IntegrityError, ProtocolError
from atoll.contract.protection import REPLY, Choice, Estimate, Exchange, Party, Replies, Terms
from atoll.contract.rounds import Field, Round, Summed
from atoll.contract.wire import Array
from atoll.crypto import shamir
from atoll.crypto.identity import SIGNATURE_BYTES
from atoll.crypto.prg import KEY_BYTES, Stream, derive, fresh_key, label, mask_bytes_s
from atoll.crypto.session import SEAL_BYTES, SIGNED_BYTES, Session, check_claim
from atoll.privacy.secagg.agreement import (
    AGREE,
    Bytes,
    array,
    begin,
    begun,
    byte_rows,
    check_agreed,
    check_signed,
    dense,
    enough,
    forget,
    listed,
    quorum,
    sign_survivors,
    survivors_of,
)
from atoll.privacy.secagg.graph import degree, holders, neighbours, threshold
from atoll.privacy.secagg.group import Group, Ring

ADVERT_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES
"""A mask key, a commitment to the self-mask seed, and the identity's signature of both."""
SHARE_BYTES = 2 * KEY_BYTES
SEALED_BYTES = SHARE_BYTES + SEAL_BYTES
PEER_S = 1e-3
"""About what one neighbour costs a site in keys, envelopes and signatures."""


class SecAgg:
    """See the module's docstring."""

    name = "secagg"
    reveals = False
    attempts = True
    capabilities = Capabilities(
        "protection 'secagg'", needs=frozenset({"bounded", "resolution"}), offers=frozenset({"sum", "ready"})
    )

    def open_group(
        self, fields: Mapping[str, Field], sites: Sequence[str], terms: Terms
    ) -> Generator[Exchange, Replies, Group]:
        """Where replies of *fields* are added up, at the coordinator, which may have to ask *sites* for it."""
        yield from ()
        return Ring(fields, len(terms.cohort))

    def join_group(self, fields: Mapping[str, Field], party: Party) -> Group:
        """The same at a site, which is asked for its reply."""
        return Ring(fields, len(party.terms.cohort))

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
        around, names = neighbours(terms), terms.cohort
        width, needed = len(around[names[0]]), quorum(terms)
        here = {site: array(sessions[site]) for site in sites if site in sessions}

        shared = yield Exchange(
            "shares", tuple(here), {"advert": byte_rows(ADVERT_BYTES), "sealed": byte_rows(width, SEALED_BYTES)},
            send_to={site: dense("sessions", SIGNED_BYTES, around[site], here) for site in here},
        )  # fmt: skip
        enough(len(shared), needed, "shares")
        adverts = {site: reply.array("advert").copy() for site, reply in shared.items()}
        sealed = {site: dict(zip(around[site], reply.array("sealed"), strict=True)) for site, reply in shared.items()}

        told = {}
        for site in adverts:
            told[site] = dense("adverts", ADVERT_BYTES, around[site], adverts)
            envelopes = {other: sealed[other][site] for other in around[site] if other in sealed}
            told[site] |= dense("sealed", SEALED_BYTES, around[site], envelopes)
        replies = yield Exchange(REPLY, tuple(adverts), group.declared(), group.told, told)
        enough(len(replies), max(needed, terms.min_sites), REPLY)
        total = yield from group.total(replies)

        survivors = {"survivors": survivors_of(terms, replies)}
        agreed = yield Exchange(AGREE, tuple(replies), {"signature": byte_rows(SIGNATURE_BYTES)}, survivors)
        enough(len(agreed), needed, AGREE)
        signatures = {site: reply.array("signature").copy() for site, reply in agreed.items()}
        opened = yield Exchange(
            "unmask", tuple(agreed), {"shares": byte_rows(width + 1, KEY_BYTES)},
            dense("signatures", SIGNATURE_BYTES, names, signatures),
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
        steps = {"shares": self._shares, AGREE: self._agree, "unmask": self._unmask}
        if step not in steps:
            raise ProtocolError("secagg.order", "secure aggregation has no such step", field=step)
        return steps[step](party)

    def _shares(self, party: Party) -> dict[str, Array]:
        """Fresh secrets, signed, and a share of them for every neighbour that is there."""
        terms, state = party.terms, party.state
        around = neighbours(terms)[party.name]
        others = listed(party, "sessions", SIGNED_BYTES, around)
        (private, public), seed, needed = Session.fresh_pair(), fresh_key(), _needed(around, terms)
        enough(len(others) + 1, needed, "shares")
        number = holders(party.name, around)
        split = shamir.split(private + seed, needed, [number[site] for site in (party.name, *others)])
        begin(party)
        state |= {"own": array(split[number[party.name]]), "private": array(private), "seed": array(seed)}
        envelopes = {}
        for other, session in others.items():
            key = check_claim(session.tobytes(), terms.run, terms.agreed, other, terms.roster[other])
            about = label("share", *terms.label(party.name, other))
            envelopes[other] = array(party.session.seal(key, about, split[number[other]]))
            state[f"session {other}"] = array(key)
        told = public + _commitment(seed)
        advert = told + party.sign(_advert(terms, party.name, told))
        return {"advert": array(advert), "sealed": dense("sealed", SEALED_BYTES, around, envelopes)["sealed"]}

    def _masked(self, party: Party, group: Group, reply: Mapping[str, Array]) -> dict[str, Array]:
        """The vector under its masks; keeps what neighbours shared, and forgets its own secrets."""
        terms, state = party.terms, begun(party, "private")
        around = neighbours(terms)[party.name]
        adverts = listed(party, "adverts", ADVERT_BYTES, around)
        envelopes = listed(party, "sealed", SEALED_BYTES, around)
        enough(len(adverts) + 1, _needed(around, terms), REPLY)
        key, plus, minus = Session(state["private"].tobytes()), list[Stream](), list[Stream]()
        plus.append(_self_mask(state["seed"].tobytes(), terms))
        for other, advert in adverts.items():
            public, signature = advert[:-SIGNATURE_BYTES].tobytes(), advert[-SIGNATURE_BYTES:].tobytes()
            check_signed(terms, other, signature, _advert(terms, other, public))
            session = state.get(f"session {other}")
            if session is None:
                raise ProtocolError("secagg.order", "a neighbour was not there when shares were made", field=other)
            about = label("share", *terms.label(other, party.name))
            state[f"share {other}"] = array(party.session.unseal(session.tobytes(), about, envelopes[other].tobytes()))
            mask = Stream(key.pair(public[:KEY_BYTES], *terms.label("mask")))
            (plus if party.name < other else minus).append(mask)
        vectors = group.masked(reply, plus, minus)
        for name in ("private", "seed", *(name for name in state if name.startswith("session "))):
            del state[name]
        return vectors

    def _agree(self, party: Party) -> dict[str, Array]:
        """Sign the one set of survivors."""
        state, around = begun(party, "own"), neighbours(party.terms)[party.name]
        if "private" in state or "agreed" in state:
            raise ProtocolError("secagg.order", "survivors are agreed on once, after the replies", field=AGREE)
        return sign_survivors(party, [site for site in around if f"share {site}" not in state])

    def _unmask(self, party: Party) -> dict[str, Array]:
        """One share for every neighbour, after enough sites signed the same set."""
        state = begun(party, "agreed")
        survivors = check_agreed(party, "unmask")
        shares = [state["own"][KEY_BYTES:]]
        for other in neighbours(party.terms)[party.name]:
            share = state.get(f"share {other}", np.zeros(SHARE_BYTES, np.uint8))
            shares.append(share[KEY_BYTES:] if other in survivors else share[:KEY_BYTES])
        forget(state, {"at", "signed"})
        return {"shares": np.stack(shares)}


# ---------------------------------------------------------------- keys, and what is signed


def _advert(terms: Terms, site: str, public: bytes) -> bytes:
    return label("atoll secagg advert 1", *terms.label(site), public)


def _self_mask(seed: bytes, terms: Terms) -> Stream:
    return Stream(derive(seed, "self mask", *terms.label()))


def _commitment(seed: bytes) -> bytes:
    return derive(seed, "commitment")


# ---------------------------------------------------------------- counting, and taking masks off


def _needed(around: Sequence[str], terms: Terms) -> int:
    """The threshold of one site's shares: among itself and its neighbours."""
    return threshold(len(around) + 1, terms.choice.adversary)


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
    enough(len(numbers), needed, "unmask")
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
