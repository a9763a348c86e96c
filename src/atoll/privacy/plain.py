"""plain: replies are sent as they are and added by the coordinator.

Parties: sites and coordinator. Messages: one reply per site. The coordinator learns
*every site's reply*, other sites nothing. Threat model: the coordinator is trusted with
each site's share; the network is not (TLS). Dropout: the sum is that of the survivors.
Cost: one round trip; reals on a coarse grid travel in as few bits as they need (see ``narrow``). It must be written in
the plan, and allowed by each site's policy.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import AtollError
from atoll.contract.protection import REPLY, Choice, Estimate, Exchange, Party, Received, Replies, Terms, register
from atoll.contract.rounds import Field, Round, Summed
from atoll.contract.wire import Array
from atoll.privacy.narrow import declared as packed
from atoll.privacy.narrow import decode, encode, narrow

COPY_BYTES_S = 1e9
"""About how fast a reply is checked and signed."""


def add_up(replies: Replies, fields: Mapping[str, Field]) -> dict[str, Array]:
    """Σ over sites of every field, in cohort order, so that the bits do not depend on arrival.

    Counts add up in int64, reals in float64. Replies are read piecewise: memory is one
    total and one piece, however many sites there are. Raises ProtocolError, naming the site, for
    NaN, infinity and values beyond their bound.
    """
    totals: dict[str, Array] = {}
    for name, declared in fields.items():
        wide = np.int64 if np.dtype(declared.dtype).kind in "iu" else np.float64
        totals[name] = np.zeros([size or 0 for size in declared.shape], wide)
        flat = totals[name].reshape(-1)
        for site, received in replies.items():
            for offset, piece in _pieces(received, name, declared, site):
                try:
                    declared.check_values(name, piece)
                except AtollError as error:
                    raise error.at(site=site) from None
                flat[offset : offset + piece.size] += piece
    return totals


def _pieces(received: Received, name: str, declared: Field, site: str) -> Iterator[tuple[int, Array]]:
    if not narrow(declared):
        yield from received.pieces(name)
        return
    try:
        yield from decode(received.array(name), declared)
    except AtollError as error:
        raise error.at(site=site) from None


class Plain:
    """See the module's docstring."""

    name = "plain"
    reveals = True
    attempts = False
    capabilities = Capabilities("protection 'plain'", offers=frozenset({"sum", "gather", "stream", "ready"}))

    def combine(
        self, asked: Round, sites: Sequence[str], terms: Terms, sessions: Mapping[str, bytes]
    ) -> Generator[Exchange, Replies, Summed]:
        """One exchange, then a sum in cohort order."""
        fields = {name: packed(field) if narrow(field) else field for name, field in asked.reply.items()}
        replies = yield Exchange(REPLY, tuple(sites), fields)
        return Summed(add_up(replies, asked.reply), tuple(replies))

    def answer(self, step: str, party: Party, reply: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """Nothing is hidden from the coordinator."""
        return {name: encode(a, fields[name]) if narrow(fields[name]) else a for name, a in reply.items()}

    def estimate(self, fields: Mapping[str, Field], num_sites: int, choice: Choice) -> Estimate:
        """The reply as it is."""
        size = sum(field.size_bytes for field in fields.values())
        return Estimate(size / COPY_BYTES_S, size, 1)


register(Plain())
