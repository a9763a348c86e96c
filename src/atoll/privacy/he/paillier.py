"""paillier: secure aggregation whose masked vectors also travel encrypted.

The protocol is ``secagg`` (see ``atoll.privacy.secagg.masking``) with the integers modulo N for its group, where N is
the modulus of a Paillier key (see ``atoll.crypto.paillier``): dropouts, thresholds, the one agreed set of survivors
and the check of identities are the same code.

Parties: as in secagg; one of the sites is the key holder (see ``key_holder``).
Messages, six exchanges a round:
 key      the key holder makes a key for the run, and signs its public part.
 shares   as in secagg.
 reply    each site packs its fixed-point numbers into cells, adds its self mask and its pair masks, uniform modulo N,
          and encrypts. The coordinator multiplies the ciphertexts.
 decrypt  the key holder decrypts the product: the sum of the survivors' cells, under their self masks.
 agree, unmask   as in secagg; then the coordinator takes the masks off, modulo N.
What each party learns: the coordinator the sum over the survivors and who they are. The key holder nothing: what it
decrypts is uniform modulo N. Key holder and coordinator together: still only that sum, as the cells are masked.
Threat model: as in secagg, with the key holder among those who may collude. Who has no key, and records
the wire, needs to break both Paillier and the masks. A site, or the key holder, may spoil the sum; a cell
that does not come out in its range is refused.
Dropout: as in secagg, but nobody replaces a key holder that is gone between "key" and "decrypt": the round ends with
``he.key-holder-gone``, and nothing is told. Unless the plan names it, the next round finds another.
Cost: for values in slots of s bits (just wide enough for the cohort's sum), k·s / (bits(N) − 1) cells of 2·bits(N)
each; an exponentiation modulo N² a cell to encrypt, about half one to decrypt; two round trips more than secagg.
Exactness: as in secagg: an error of at most n·step/2 on each element; counts none.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from functools import cache, lru_cache

import numpy as np

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import ProtocolError
from atoll.contract.protection import REPLY, Choice, Estimate, Exchange, Party, Replies, Terms
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.fixed_base import FixedBase
from atoll.crypto.packing import add_mod, masks
from atoll.crypto.paillier import Ciphertexts, PrivateKey, PublicKey
from atoll.crypto.prg import Stream
from atoll.privacy.he.key_holder import DECRYPT, KEY, PublicKeyOf, gone, join_key, open_key, private_key, publish
from atoll.privacy.he.slots import Slots
from atoll.privacy.secagg.group import Group, Ring, Vectors
from atoll.privacy.secagg.masking import SecAgg

SCHEME = "paillier"


class Paillier(SecAgg):
    """See the module's docstring."""

    name = "paillier"
    capabilities = Capabilities(
        "protection 'paillier'", needs=frozenset({"bounded", "resolution"}), offers=frozenset({"sum", "ready"})
    )

    def open_group(
        self, fields: Mapping[str, Field], sites: Sequence[str], terms: Terms
    ) -> Generator[Exchange, Replies, Group]:
        key = yield from open_key(SCHEME, sites, terms, _bytes(terms.choice.key_bits * 3 // 8))
        try:
            return Cells(fields, terms, key)
        except ProtocolError as error:
            raise error.at(site=key.holder) from None

    def join_group(self, fields: Mapping[str, Field], party: Party) -> Group:
        return Cells(fields, party.terms, join_key(SCHEME, party))

    def estimate(self, fields: Mapping[str, Field], num_sites: int, choice: Choice) -> Estimate:
        """A power modulo N² for each cell, beside what secagg costs, and two more exchanges."""
        cells, masking = (
            Slots(fields, num_sites, choice.key_bits).num_cells,
            super().estimate(fields, num_sites, choice),
        )
        vector = sum(field.size_bytes for field in Ring(fields, num_sites).declared().values())
        size = cells * choice.key_bits // 4 + choice.key_bits * 3 // 8
        return Estimate(masking.seconds + cells * _power_s(choice.key_bits), masking.bytes - vector + size, 6)

    def answer(self, step: str, party: Party, reply: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """One of the six steps, in their order."""
        if step == KEY:
            return publish(SCHEME, party, lambda: _fresh(party.terms.choice.key_bits))
        if step == DECRYPT:
            return self._decrypted(party)
        left = super().answer(step, party, reply, fields)
        if step == REPLY:
            party.state["cells"] = np.array(len(left["cells"]))
        return left

    def _decrypted(self, party: Party) -> dict[str, Array]:
        """The sum under its masks. It needs no proof of what was added up: without the masks it tells nothing."""
        terms, state = party.terms, party.state
        expected = state.get("cells")
        if expected is None or state["at"].tolist() != [terms.round, terms.attempt]:
            raise ProtocolError("he.order", "a sum is decrypted after the reply of the same round", field=DECRYPT)
        key, total = PrivateKey.from_bytes(private_key(SCHEME, party)), party.sent.get("total")
        if total is None or total.shape != (int(expected), key.public.ciphertext_bytes):
            raise ProtocolError("he.malformed", "the sum to decrypt is not of the size of a reply", field=DECRYPT)
        del state["cells"]
        return {"cells": _rows(key.decrypt(Ciphertexts.from_array(key.public, total)), key.public.bits // 8)}


class Cells:
    """A reply as packed integers modulo N (see ``slots``), which leave a site encrypted."""

    def __init__(self, fields: Mapping[str, Field], terms: Terms, key: PublicKeyOf) -> None:
        """Raises PlanError where a sum does not fit, ProtocolError for a key that is not of the plan's size."""
        bits = terms.choice.key_bits
        self.told, self._holder, self._public = key.told, key.holder, _public(key.data)
        if self._public.bits != bits:
            raise ProtocolError(
                "he.key-size", f"a public key of {self._public.bits} bits instead of {bits}", field=key.holder,
                remedy="the key holder does not keep the plan: do not go on with it",
            )  # fmt: skip
        self._slots = Slots(fields, len(terms.cohort), bits)

    def declared(self) -> dict[str, Field]:
        return {"cells": _bytes(self._slots.num_cells, self._public.ciphertext_bytes)}

    def masked(self, arrays: Mapping[str, Array], plus: Sequence[Stream], minus: Sequence[Stream]) -> dict[str, Array]:
        vectors = {"cells": self._slots.pack(arrays)}
        self.add_masks(vectors, plus, minus)
        return {"cells": self._public.encrypt(vectors["cells"]).to_array()}

    def add_masks(self, vectors: Vectors, plus: Sequence[Stream], minus: Sequence[Stream]) -> None:
        n = int(self._public.n)
        for i, stream in enumerate([*plus, *minus]):
            drawn = masks(stream.bytes, self._slots.num_cells, n)
            vectors["cells"] = add_mod(vectors["cells"], drawn, n, 1 if i < len(plus) else -1)

    def total(self, replies: Replies) -> Generator[Exchange, Replies, Vectors]:
        """The product of ciphertexts, decrypted by the key holder, which must be among those who replied."""
        if self._holder not in replies:
            raise gone(REPLY)
        arrived: list[Ciphertexts] = []
        for site, received in replies.items():
            try:
                arrived.append(Ciphertexts.from_array(self._public, received.array("cells")))
            except ProtocolError as error:
                raise error.at(site=site) from None
        product = self._public.add(*arrived).to_array()
        cells = {"cells": _bytes(self._slots.num_cells, self._public.bits // 8)}
        opened = yield Exchange(DECRYPT, (self._holder,), cells, {"total": product})
        if self._holder not in opened:
            raise gone(DECRYPT)
        return {"cells": [int.from_bytes(row.tobytes(), "little") for row in opened[self._holder].array("cells")]}

    def decode(self, vectors: Vectors, num_sites: int) -> dict[str, Array]:
        return self._slots.sums(vectors["cells"], num_sites)


@lru_cache(maxsize=2)
def _public(data: bytes) -> PublicKey:
    """Checked once, and with its tables (up to 128 MB), which many rounds use."""
    return PublicKey.from_bytes(data)


@cache
def _power_s(bits: int) -> float:
    """What a power modulo the square of a number of *bits* takes; measured once."""
    powers, exponent = FixedBase(3, (1 << 2 * bits) - 1, bits // 8), np.full((1, bits // 8), 255, np.uint8)
    start = time.perf_counter()
    powers.powers(exponent)
    return time.perf_counter() - start


def _fresh(bits: int) -> tuple[bytes, bytes]:
    made = PrivateKey.generate(bits)
    return made.to_bytes(), made.public.to_bytes()


def _rows(cells: list[int], size_bytes: int) -> Array:
    joined = b"".join(cell.to_bytes(size_bytes, "little") for cell in cells)
    return np.frombuffer(joined, np.uint8).reshape(len(cells), size_bytes)


def _bytes(*shape: int) -> Field:
    return Field("|u1", shape, 255, 1)
