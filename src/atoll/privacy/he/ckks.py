"""ckks: long vectors travel encrypted; the coordinator adds them blindly, and a key-holder site decrypts the sum.

Parties: the sites of the approved roster, one of them the key holder (see ``key_holder``), and the coordinator, which
relays everything. Encryption: ``atoll.crypto.ckks``.
Messages, four exchanges a round:
 key      the key holder makes a key for the run, and signs its public part.
 reply    each site splits its numbers into parts (see ``limbs``), and encrypts them. The coordinator adds.
 agree    the coordinator says whose replies arrived: the survivors. Each site durably signs *one* such set.
 decrypt  shown enough signatures on the very set that it signed itself, the key holder decrypts the sum, once in an
          attempt at the round, and adds the noise that hides its key.
What each party learns: the coordinator the sum over the survivors and who they are. The key holder the same sum.
The other sites nothing.
Threat model: curious parties that do not collude. *Not covered*: key holder and coordinator together see each site's
reply; a coordinator that does not keep the protocol could have one site's ciphertext decrypted in place of the sum,
since the key holder cannot see of whose replies a ciphertext is made (that enough sites signed the survivors is all
it can check). ``secagg`` and ``paillier`` cover both. A site, or the key holder, may spoil the sum.
Dropout: replies that do not arrive are left out, down to the threshold of ``secagg``. Nobody replaces a key holder that
is gone between "key" and "decrypt": the round ends with ``he.key-holder-gone``, and nothing is told. Unless the
plan names it, the next round finds another.
Cost: 56 bytes for each part of a number (224 KiB at least): one part for what adds up to at most 2²¹ steps over all
sites, two for 2⁴⁰ steps; 330 KB of key to each site; four round trips.
Exactness: as under secagg: an error of at most n·step/2 on each element; counts none.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.protection import REPLY, Choice, Estimate, Exchange, Party, Replies, Terms
from atoll.contract.rounds import Field, Round, Summed, opaque
from atoll.contract.wire import Array
from atoll.crypto.ckks import CIPHERTEXT_BYTES, MAX_PUBLIC_BYTES, SLOTS, Ckks, CkksPublic
from atoll.crypto.identity import SIGNATURE_BYTES
from atoll.privacy.he.key_holder import DECRYPT, KEY, gone, join_key, open_key, private_key, publish
from atoll.privacy.he.limbs import Limbs
from atoll.privacy.secagg.agreement import (
    AGREE,
    begin,
    begun,
    byte_rows,
    check_agreed,
    dense,
    enough,
    forget,
    quorum,
    sign_survivors,
    survivors_of,
)

SCHEME = "ckks"


class CkksSum:
    """See the module's docstring."""

    name = "ckks"
    reveals = False
    attempts = True

    @property
    def capabilities(self) -> Capabilities:
        """Raises PlanError without the extra: a plan is refused before anyone is asked to join."""
        if find_spec("tenseal") is None:
            raise PlanError(
                "ckks.missing", "protection ckks needs TenSEAL, which is not installed", field="protection",
                remedy="pip install 'atoll[he]'",
            )  # fmt: skip
        return Capabilities(
            "protection 'ckks'", needs=frozenset({"bounded", "resolution"}), offers=frozenset({"sum", "ready"})
        )

    def estimate(self, fields: Mapping[str, Field], num_sites: int, choice: Choice) -> Estimate:
        """Ciphertexts made, and for the key holder decrypted."""
        rows = _num_rows(Limbs(fields, num_sites))
        return Estimate(2 * rows * _ciphertext_s(), rows * CIPHERTEXT_BYTES + MAX_PUBLIC_BYTES, 4)

    # ---------------------------------------------------------------- the coordinator

    def combine(
        self, asked: Round, sites: Sequence[str], terms: Terms, sessions: Mapping[str, bytes]
    ) -> Generator[Exchange, Replies, Summed]:
        """key → reply → agree → decrypt."""
        limbs, needed = Limbs(asked.reply, len(terms.cohort)), quorum(terms)
        key = yield from open_key(SCHEME, sites, terms, opaque(MAX_PUBLIC_BYTES))
        try:
            public = _public(key.data)
        except ProtocolError as error:
            raise error.at(site=key.holder) from None
        declared = {"ciphertexts": byte_rows(_num_rows(limbs), CIPHERTEXT_BYTES)}
        replies = yield Exchange(REPLY, tuple(sites), declared, key.told)
        enough(len(replies), max(needed, terms.min_sites), REPLY)
        if key.holder not in replies:
            raise gone(REPLY)
        total = public.add(*(received.array("ciphertexts") for received in replies.values()))
        survivors = {"survivors": survivors_of(terms, replies)}
        agreed = yield Exchange(AGREE, tuple(replies), {"signature": byte_rows(SIGNATURE_BYTES)}, survivors)
        enough(len(agreed), needed, AGREE)
        if key.holder not in agreed:
            raise gone(AGREE)
        signatures = {site: reply.array("signature").copy() for site, reply in agreed.items()}
        opened = yield Exchange(
            DECRYPT, (key.holder,), {"values": Field("<f8", (limbs.num_values,))},
            {"total": total, **dense("signatures", SIGNATURE_BYTES, terms.cohort, signatures)},
        )  # fmt: skip
        if key.holder not in opened:
            raise gone(DECRYPT)
        return Summed(limbs.sums(opened[key.holder].array("values"), len(replies)), tuple(replies))

    # ---------------------------------------------------------------- the site

    def answer(self, step: str, party: Party, reply: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """One of the four steps, in their order."""
        if step == KEY:
            return publish(SCHEME, party, _fresh)
        if step == REPLY:
            return self._encrypted(party, reply, Limbs(fields, len(party.terms.cohort)))
        if step == AGREE:
            if "agreed" in begun(party, "values"):
                raise ProtocolError("secagg.order", "survivors are agreed on once, after the replies", field=AGREE)
            return sign_survivors(party)
        if step == DECRYPT:
            return self._decrypted(party)
        raise ProtocolError("he.order", "homomorphic encryption has no such step", field=step)

    def _encrypted(self, party: Party, reply: dict[str, Array], limbs: Limbs) -> dict[str, Array]:
        begin(party)
        party.state["values"] = np.array(limbs.num_values)
        public = _public(join_key(SCHEME, party).data)
        return {"ciphertexts": public.encrypt(limbs.split(reply), 1.0)}

    def _decrypted(self, party: Party) -> dict[str, Array]:
        state = begun(party, "agreed")
        survivors, total = check_agreed(party, DECRYPT), party.sent.get("total")
        if total is None:
            raise ProtocolError("he.malformed", "there is no sum to decrypt", field=DECRYPT)
        key, num_values = _restored(private_key(SCHEME, party)), int(state["values"])
        forget(state, {"at", "signed"})
        return {"values": key.decrypt(total, num_values, 1.0, len(survivors))}


def _num_rows(limbs: Limbs) -> int:
    return -(-limbs.num_values // SLOTS)


@lru_cache(maxsize=8)
def _public(data: bytes) -> CkksPublic:
    """Checked once; many rounds use it."""
    return CkksPublic(data)


def _fresh() -> tuple[bytes, bytes]:
    made = Ckks()
    return made.to_bytes(), made.public


def _restored(data: bytes) -> Ckks:
    """What :func:`_fresh` made, from the site's own journal."""
    return Ckks(data)


@cache
def _ciphertext_s() -> float:
    """What a ciphertext takes; measured once."""
    public = CkksPublic(Ckks().public)
    start = time.perf_counter()
    public.encrypt(np.zeros(SLOTS), 1.0)
    return time.perf_counter() - start
