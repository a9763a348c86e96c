"""Every error Atoll raises, in one tree.

    AtollError
    ├── PlanError            the plan, schema or recipe is wrong or contradicts itself
    ├── SchemaError          a site's table does not keep the data contract
    ├── PolicyError          a site's policy forbids what was asked
    ├── DisclosureError      a release would reveal too much about too few
    ├── PrivacyBudgetError   the privacy budget does not cover a release
    ├── ProtocolError        a party sent something the protocol does not allow
    ├── TransportError       a party could not be reached, or not in time
    └── IntegrityError       a signature, digest, certificate or ledger does not verify

An error says *what* (``code`` and message), *where* (``site``, ``round``, ``step``,
``field``) and *what to do* (``remedy``). Messages never contain a data value. Only
``public()`` leaves a site: the fixed code, the field's name and the remedy.
"""

from __future__ import annotations

from typing import Any, Self

MAX_PARTS = 50
MAX_DEPTH = 2
"""Of an error's parts, as far as another party is believed."""
PLACES = ("site", "run", "round", "step")
"""Where something happened is told in this order."""


class AtollError(Exception):
    """Base of all Atoll errors.

    code: fixed, machine-readable, such as ``"schema.missing-column"``.
    message: one plain sentence, without data values; stays at the party that raised it.
    remedy: what the reader can do, a fixed text; may leave the site.
    field: name of the column, plan key or array concerned.
    """

    def __init__(
        self, code: str, message: str, *, remedy: str = "", field: str = "", where: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.field = field
        self.where: dict[str, Any] = dict(where or {})
        self.parts: list[AtollError] = []

    def at(self, **where: Any) -> Self:
        """Add where it happened (site, run, round, step, trace); the innermost place wins."""
        self.where = {**{k: v for k, v in where.items() if v is not None}, **self.where}
        return self

    def public(self) -> dict[str, Any]:
        """What may leave a site: kind, code, field and remedy (of each part); never the message."""
        record = {"error": type(self).__name__, "code": self.code, "field": self.field, "remedy": self.remedy}
        return {**record, "parts": [part.public() for part in self.parts[:MAX_PARTS]]}

    def told(self) -> dict[str, Any]:
        """As other parties of a run are told of it: :meth:`public`, and where it happened, of each part."""
        return {**self.public(), **self.where, "parts": [part.told() for part in self.parts[:MAX_PARTS]]}

    @staticmethod
    def from_public(record: dict[str, Any], **where: Any) -> AtollError:
        """Rebuild the error another party reported through :meth:`public`, whatever it sent.

        where: what is known here of the place; it wins over what the party says.
        """
        return AtollError._rebuilt(record, where, depth=0)

    @staticmethod
    def _rebuilt(record: dict[str, Any], where: dict[str, Any], depth: int) -> AtollError:
        kinds = {kind.__name__: kind for kind in AtollError.__subclasses__()}
        kind = kinds.get(str(record.get("error")), ProtocolError)
        code, remedy, field = (_printable(record.get(k)) for k in ("code", "remedy", "field"))
        told = {k: _printable(record[k]) for k in ("site", "round", "step", "trace") if record.get(k) not in (None, "")}
        where = {**told, **where}
        listed = record.get("parts") if depth < MAX_DEPTH else None
        parts = [
            AtollError._rebuilt(part, {}, depth + 1)
            for part in (listed[:MAX_PARTS] if isinstance(listed, list) else [])
            if isinstance(part, dict)
        ]
        if parts:
            return _listed(kind, code, parts).at(**where)
        return kind(code, "", remedy=remedy, field=field, where=where)

    def __str__(self) -> str:
        where = {name: self.where[name] for name in PLACES if name in self.where} | self.where
        places = [f"{name} {value}" for name, value in where.items() if name != "trace" and value != ""]
        text = self.message or self.code
        if not self.parts:
            if self.field and self.field not in text:
                text += f" ({self.field})"
            if self.remedy:
                text += f" → {self.remedy}"
        if places:
            text = f"{', '.join(places)}: {text}"
        if self.where.get("trace"):
            mark = f" [trace {self.where['trace']}]"
            text = text.replace(mark, "") + mark  # once, whatever the parts say
        return text


class PlanError(AtollError):
    """The plan, schema or recipe is wrong, or asks for what cannot be combined."""


class SchemaError(AtollError):
    """A site's table does not keep the data contract."""


class PolicyError(AtollError):
    """A site's policy forbids what was asked."""


class DisclosureError(AtollError):
    """A release would reveal too much about too few people."""


class PrivacyBudgetError(AtollError):
    """The data set's privacy budget does not cover the release."""


class ProtocolError(AtollError):
    """A party sent something the protocol does not allow."""


class TransportError(AtollError):
    """A party could not be reached, or not within the deadline."""


class IntegrityError(AtollError):
    """A signature, digest, certificate, token or ledger does not verify."""


def _printable(value: Any) -> str:
    """Another party's text, fit for a terminal and a log: short, and without control characters."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in ("" if value is None else str(value)[:500])
    )


def refuse_all(kind: type[AtollError], code: str, problems: list[AtollError]) -> None:
    """Raise one error listing all *problems*; return when there are none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise _listed(kind, code, problems)


def _listed(kind: type[AtollError], code: str, parts: list[AtollError]) -> AtollError:
    lines = [f"\n  {number}. {part}".replace("\n", "\n  ") for number, part in enumerate(parts, 1)]
    fields = ", ".join(dict.fromkeys(part.field for part in parts if part.field))
    error = kind(code, f"{len(parts)} problems:{''.join(lines)}", field=fields, remedy="mend each of them")
    error.parts = list(parts)
    return error
