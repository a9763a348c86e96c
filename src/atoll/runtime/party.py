"""What a handler, and the site half of a protection, may touch at a site. Nothing else is reachable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.mail import Mail
from atoll.contract.protection import Terms
from atoll.contract.wire import Array
from atoll.crypto.session import Session
from atoll.data.table import Table
from atoll.runtime.memory import Query
from atoll.runtime.policy import Policy


class View:
    """What one handler call may touch (see :class:`atoll.contract.program.SiteView`)."""

    def __init__(
        self, name: str, tables: tuple[Table, Table], state: dict[str, Array], tell: Callable[[float, float], None],
        share: tuple[str, ...], min_group_size: int, own: Callable[[], dict[str, Array]] = dict,
        mail: Mail | None = None,
    ) -> None:  # fmt: skip
        """own: reads what is personal, when it is first looked at. mail: None where there are no other sites."""
        self.name, (self.table, self.holdout), self.state = name, tables, state
        self._tell, self._share, self.min_group_size, self._own = tell, share, min_group_size, own
        self._mail, self._before = mail, dict[str, Array]()

    @property
    def mail(self) -> Mail:
        if self._mail is None:
            raise ProtocolError("mail.no-such-site", "there are no other sites here", field="mail")
        return self._mail

    @cached_property
    def personal(self) -> dict[str, Array]:
        found = self._own()
        self._before = dict(found)
        return found

    def personalised(self) -> dict[str, Array] | None:
        """What is personal, if the handler changed it."""
        mine = self.__dict__.get("personal", self._before)
        same = mine.keys() == self._before.keys() and all(mine[n] is self._before[n] for n in mine)
        return None if same else mine

    def progress(self, done: float, total: float) -> None:
        self._tell(done, total)

    def shares(self, what: str) -> bool:
        return what in self._share


@dataclass
class Own:
    """What a protection's site half may use (see :class:`atoll.contract.protection.Party`). query, personal: what the
    journal is to remember of the release, and the model that the site has for itself (None: as it was)."""

    name: str
    terms: Terms
    session: Session
    sent: Mapping[str, Array]
    state: dict[str, Array]
    sign: Callable[[bytes], bytes]
    policy: Policy
    query: Query | None = field(default=None)
    personal: dict[str, Array] | None = field(default=None)

    def replied(self) -> None:
        """Note what was asked of which rows, for when the survivors are known."""
        if self.query is not None:
            key = hashlib.sha256(f"{self.query.key} {self.terms.question}".encode()).digest()
            self.state |= {"asked": np.frombuffer(key, np.uint8), "rows": self.query.rows}

    def commit(self, survivors: Sequence[str]) -> None:
        if len(survivors) < self.policy.min_sites:
            raise PolicyError(
                "policy.too-few-survivors",
                f"{len(survivors)} sites are left, and the site's policy lets out only sums of {self.policy.min_sites}",
                field="min_sites", remedy="bring the sites back; the site's operator decides: policy.yaml, 'min_sites'",
            )  # fmt: skip
        if "asked" in self.state:
            key, rows = self.state["asked"].tobytes().hex(), self.state["rows"]
            self.query = Query(key, rows, frozenset(survivors), self.policy.min_group_size, self.policy.min_sites)
