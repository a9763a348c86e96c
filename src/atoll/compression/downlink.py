"""What sites are sent of the coordinator's model: all of it in fewer bits, or only how it changed.

*Whole*: every round's message has all weights, as halves or on grids (rounded at random: right on average), or zstd.
*Changes*: sites keep what they were sent last, and the coordinator keeps the same. Each round makes a *version* of it:
it goes towards the coordinator's own model by a message of its changed, or its most changed, elements, exactly or in
fewer bits. What a message leaves out is still in the difference, so it comes later (error feedback), and all who took
the same messages hold the same bits. A site that missed rounds is sent the messages it lacks, or everything where
that is less. The first version follows from the plan's seed, and is not sent.

Sums under a protection must be of replies to one question, else one site's reply could be told from the others'.
So the digest of the version is part of what all sites are asked, and how each gets there is not; a site goes on only
with weights of that digest.

Parties: coordinator and sites. What sites learn: the version. Threat model: what a site is sent is checked in size,
form and digest. Dropout: a site whose answer was lost may have more than the coordinator knows; it skips what it has.
Cost: the messages; the coordinator keeps as many of them as weigh as much as the model.

Sources: Tang et al. 2019, DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-pass Error-Compensated
Compression (ICML), Algorithm 1; Philippenko & Dieuleveut 2021, Preserved Central Model for Faster Bidirectional
Compression (NeurIPS), §2 (the difference to what sites hold).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.compression import coded
from atoll.compression.coded import Form
from atoll.compression.half import Precision
from atoll.compression.places import largest
from atoll.contract.bits import Bytes
from atoll.contract.errors import AtollError, PlanError, ProtocolError
from atoll.contract.rounds import APART, Task, not_taken
from atoll.contract.wire import Array

Floats = NDArray[np.floating[Any]]
Sent = tuple[dict[str, Array], dict[str, dict[str, Array]]]
"""(what all sites are sent, what single ones are)."""


class Downlink(BaseModel):
    """changes: sites keep the model, and are sent how it changed. keep: at most this share of it, the most changed.
    bits: on grids of so many; precision: else as such floats. lossless: and made smaller by zstd."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    changes: bool = False
    keep: float = Field(default=1.0, gt=0, le=1)
    bits: int | None = Field(default=None, ge=2, le=16)
    precision: Precision = "float32"
    lossless: bool = False

    @property
    def active(self) -> bool:
        """Does anything else than the model as it is go out?"""
        return self.changes or self.lossless or self.bits is not None or self.precision != "float32"

    def form(self, dtype: np.dtype[Any]) -> Form:
        """Of a message. Without rounding, values travel as the bits that changed."""
        lossy = self.bits is not None or self.precision != "float32"
        return Form(self.bits, self.precision, 0 if lossy else dtype.itemsize, self.lossless)

    def conflicts(self) -> list[AtollError]:
        """What cannot be combined."""
        found: list[AtollError] = []
        if self.keep < 1 and not self.changes:
            found.append(PlanError(
                "plan.illegal-compression", "a part of the model is of no use to sites that keep none of it",
                field="params.compress.down.keep", remedy="set down.changes: true",
            ))  # fmt: skip
        if self.bits is not None and self.precision != "float32":
            found.append(PlanError(
                "plan.illegal-compression", "bits and precision cannot be combined: values are on a grid, or floats",
                field="params.compress.down.bits", remedy="leave out bits, or precision",
            ))  # fmt: skip
        return found

    # -- the whole, each time

    def whole(self, model: Floats, seed: int, number: int) -> dict[str, Array]:
        """All of *model* [size] as round *number* sends it."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, 9))))
        return {"coded": _of(model, np.arange(len(model)), model, self.form(model.dtype), random)}

    def taken(self, task: Task, size: int, dtype: np.dtype[Any]) -> Floats:
        """What a site reads there, [size]; raises ProtocolError."""
        told, read = task.arrays.get("coded"), np.zeros(size, dtype)
        if told is None:
            raise not_taken("coded")
        _applied(read, told, self.form(dtype), size)
        return _finite(read)


class Versions:
    """The coordinator's side: the version that sites are brought to, and which of them each has."""

    def __init__(self, rule: Downlink, first: Floats, seed: int, sites: Sequence[str]) -> None:
        """first: the model [size] at the beginning, as sites make it of *seed*."""
        self.rule, self.seed, self.sites = rule, seed, tuple(sites)
        self.held, self.number = first.copy(), 0
        self.messages: list[Bytes] = []
        self.has = dict.fromkeys(self.sites, 0)

    def towards(self, model: Floats) -> Sent:
        """Make the next version, nearer to *model* [size], if it differs; what brings every site to it."""
        changed = np.flatnonzero(model != self.held)
        size = len(model)
        if len(changed):
            most = max(1, round(self.rule.keep * size))
            if len(changed) > most:
                apart = model.astype(np.float64) - self.held
                changed = largest(apart, most)
            message = _of(model, changed, self.held, self.rule.form(model.dtype), None)
            _applied(self.held, message, self.rule.form(model.dtype), most)
            self.number += 1
            self.messages.append(message)
            while sum(map(len, self.messages)) > self.held.nbytes:
                del self.messages[0]
        return self._question(), self._lacking()

    def answered(self, sites: Sequence[str]) -> None:
        """These have the version."""
        self.has |= {site: self.number for site in sites if site in self.has}

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        return {
            "down held": self.held.copy(),
            "down number": np.array(self.number),
            "down has": np.array([self.has[site] for site in self.sites], np.int64),
            "down sizes": np.array([len(message) for message in self.messages], np.int64),
            "down messages": np.concatenate([*self.messages, np.zeros(0, np.uint8)]),
        }

    def restore(self, state: dict[str, Array]) -> Self:
        """As :meth:`arrays` was made; takes them out of *state*. Nothing changes where there are none."""
        if "down held" not in state:
            return self
        self.held, self.number = state.pop("down held").copy(), int(state.pop("down number"))
        self.has = dict(zip(self.sites, state.pop("down has").tolist(), strict=True))
        ends = np.cumsum(state.pop("down sizes"))
        self.messages = np.split(state.pop("down messages"), ends[:-1]) if len(ends) else []
        state.pop("down messages", None)
        return self

    def _question(self) -> dict[str, Array]:
        version = np.array([self.seed, self.number], np.int64)
        return {"version": version, "digest": digest(self.held)}

    def _lacking(self) -> dict[str, dict[str, Array]]:
        """By site; those with the same version share the arrays."""
        made: dict[int, dict[str, Array]] = {}
        for has in set(self.has.values()):
            lacks = self.messages[max(0, len(self.messages) - (self.number - has)) :] if has < self.number else []
            if len(lacks) < self.number - has or sum(map(len, lacks)) > self.held.nbytes:
                form = Form(words=self.held.itemsize, lossless=self.rule.lossless)
                every = np.arange(len(self.held))
                made[has] = {APART + "whole": _of(self.held, every, np.zeros_like(self.held), form, None)}
            else:
                sizes = np.array([len(message) for message in lacks], np.int64)
                made[has] = {APART + "changes": np.concatenate([*lacks, np.zeros(0, np.uint8)]), APART + "sizes": sizes}
        return {site: made[has] for site, has in self.has.items()}


def received(
    rule: Downlink, task: Task, state: dict[str, Array], size: int, dtype: np.dtype[Any], first: Callable[[int], Floats]
) -> Floats:
    """The site's side: the version [size] that a task is about; kept in *state*. first: the model at the beginning, of
    a seed. Raises ProtocolError for anything else than weights of the task's digest."""
    version, wanted = task.arrays.get("version"), task.arrays.get("digest")
    if version is None or wanted is None or version.dtype != np.int64 or version.shape != (2,) or min(version) < 0:
        raise not_taken("version")
    seed, number = int(version[0]), int(version[1])
    has = int(state.get("held version", -1))
    whole, changes, sizes = (task.arrays.get(APART + name) for name in ("whole", "changes", "sizes"))
    if whole is not None:
        held = np.zeros(size, dtype)
        _applied(held, whole, Form(words=dtype.itemsize, lossless=rule.lossless), size)
    elif changes is None or sizes is None or sizes.dtype != np.int64 or sizes.ndim != 1 or (sizes < 0).any():
        raise not_taken("changes")
    else:
        if sizes.sum() != len(changes) or len(sizes) > number:
            raise not_taken("changes")
        before = number - len(sizes)
        if has < before and before > 0:
            raise ProtocolError("compression.no-base", "a task says how a model changed that the site does not have",
                                field="version", remedy="submit the study again")  # fmt: skip
        held = first(seed).astype(dtype) if has < 0 else state["held"].copy()
        most = max(1, round(rule.keep * size))
        parts = np.split(changes, np.cumsum(sizes)[:-1]) if len(sizes) else []
        for message in parts[max(0, max(has, 0) - before) :]:
            _applied(held, message, rule.form(dtype), most)
    if held.shape != (size,) or not np.array_equal(digest(held), wanted):
        raise ProtocolError(
            "compression.other-model", "the weights that a site was brought to are not those that all are asked about",
            field="digest", remedy="use the same versions of Atoll, numpy and the model's package at all parties",
        )  # fmt: skip
    if has != number:
        state["held"], state["held version"] = held, np.array(number)
    return _finite(held)


def digest(model: Floats) -> Array:
    """Of the bits of *model*: SHA-256, [32]."""
    little = np.ascontiguousarray(model, model.dtype.newbyteorder("<"))
    return np.frombuffer(hashlib.sha256(b"atoll model 1\0" + little.tobytes()).digest(), np.uint8)


def _of(
    model: Floats, chosen: NDArray[np.int64], held: Floats, form: Form, random: np.random.Generator | None
) -> Bytes:  # fmt: skip
    """How *held* becomes *model* at the places *chosen*; where they are the same array, the model itself."""
    size = len(model)
    if form.words:
        bits = model[chosen].view(f"u{form.words}")
        return coded.encode(bits if held is model else bits ^ held[chosen].view(bits.dtype), chosen, size, form)
    apart = model[chosen].astype(np.float64)
    return coded.encode(apart if held is model else apart - held[chosen], chosen, size, form, random)


def _applied(held: Floats, message: Array, form: Form, most: int) -> None:
    """Change *held* as a message says."""
    chosen, values = coded.decode(message, len(held), form, most)
    if form.words:
        held[chosen] = (held[chosen].view(values.dtype) ^ values).view(held.dtype)
    else:
        held[chosen] += values.astype(held.dtype)


def _finite(model: Floats) -> Floats:
    if not np.isfinite(model).all():
        raise not_taken("weights")
    return model
