"""Gossip: sites learn from their neighbours, and nobody has the federation's model.

Source: Lian et al. 2017, Can Decentralized Algorithms Outperform Centralized Algorithms? (NeurIPS), Algorithm 1,
D-PSGD: x_{k+1,i} = Σⱼ W_ij x_{k,j} − γ ∇F_i(x_{k,i}; ξ), all from the same x_0. Here a site may take several mini-batch
steps from x_{k,i}, and their change stands in the gradient's place; at the end the models are mixed once more. Every
site counts alike. W and who talks to whom: ``aggregation/topology.py``; the exponential graph by Ying et al. 2021.

Parties: sites, each other's neighbours; the coordinator, which keeps time and carries mail. Messages: first each site's
session key, signed by its approved identity; then in every round a site's model, in an envelope for each neighbour
(``contract/mail.py``), which leaves with one round and arrives with the next. Now and then, and in the end, one Sum of
mean losses and of squared distances between neighbours' models. Models are scored where they are. What each learns: a
site the models of those it hears from, in every round, and so what a model tells of its rows: a site takes part in this
only where its policy allows this program, and its operator the plan with its topology. The coordinator learns who talks
to whom, sizes, who was there, and the sums (each site's numbers under ``plain``); of no model anything. Its result has
none. Threat model: neighbours are curious and keep to the protocol; a coordinator may be worse, as it can only leave
envelopes out: those that it makes up, alters, sends elsewhere or again do not open, and stop the site. A coordinator
that colludes with a neighbour learns what that neighbour does. A neighbour that lies spoils others' models, by the
weight that W gives it; one that sends no finite numbers is not heard. Dropout: who does not hear from a neighbour gives
that weight to its own model; a site that comes back goes on with the model it had. A coordinator that was killed goes
on with the mail that it kept; models are at the sites alone. Cost: a round trip, and the model once for each neighbour
to and from each site, per round.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from atoll.aggregation.topology import Topology, connectivity, heard, mixing, spectral_gap, told, without
from atoll.contract.disclosure import check_groups
from atoll.contract.errors import ProtocolError
from atoll.contract.mail import SEAL_BYTES, SIGNED_KEY_BYTES
from atoll.contract.program import Cohort, SiteView, handler, program
from atoll.contract.rounds import (
    Checkpoint,
    Gather,
    Metrics,
    Reply,
    Round,
    Steps,
    Sum,
    Task,
    count,
    not_taken,
    opaque,
    real,
)
from atoll.contract.rounds import Field as Declared
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.local import Kept, Local, LocalParams, layers_of, still
from atoll.models.model import Model
from atoll.statistics.noise import fine

STEP = "model"
Standing = tuple[dict[int, Array], dict[int, dict[int, Array]], list[float], int, bool]
"""The sites' keys by place, mail by receiver and sender, mean losses, the next round, and whether time is used up."""


class GossipParams(LocalParams):
    """topology: who hears from whom, the sites in order of their names. clip: a site's change of any one weight in a
    round is clipped to it. report_every: tell the mean loss, and how far models are apart, after so many rounds.
    checkpoint_every: after so many rounds the coordinator keeps who is where and the mail that waits, and forgets what
    led to it."""

    rounds: int = Field(default=20, ge=1)
    topology: Topology = "ring"
    clip: float = Field(default=10.0, gt=0)
    report_every: int = Field(default=5, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)


@program("horizontal.gossip", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Gossip:
    """Learning from neighbours alone: no coordinator has a model, and each site ends with its own."""

    Params = GossipParams
    remembers = True
    shared = False

    def __init__(self, params: GossipParams) -> None:
        self.params, self._kept = params, Kept(params)

    def model(self, schema: TableSchema) -> Model:
        """What a site's model is, before any fitting."""
        return self._kept.model(schema)

    # -- at the coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"gossip": {"topology", "spectral_gap", "sites", "loss", "apart": root mean square distance of two
        neighbours' models before they were mixed for the last time, "from_mean_most": the same of a model and the mean
        of all, at most; None where the topology does not say}, "history": mean loss by report}."""
        p, names, model = self.params, tuple(sorted(cohort.sites)), self.model(cohort.schema)
        layers_of(model, p.freeze)
        size, fields = self._envelope(model), {"mail": self._field(model, len(names))}
        fresh: Standing = ({}, {}, [], 0, False)
        keys, mail, history, number, used_up = _resumed(start) if start else fresh
        keys = keys if start else (yield from _keyed(names))
        found, last = dict[str, float](), False
        while not last:
            last = used_up or number == p.rounds
            weights = mixing(p.topology, len(names), number + 1)
            writes = {place: [] if last else [j for j in told(weights, place) if j in keys] for place in keys}
            send_to = {names[place]: _parcel(keys, mail.get(place, {}), writes[place], size) for place in sorted(keys)}
            send = {"iteration": np.array(number), "seed": np.array(cohort.seed), "last": np.array(int(last))}
            asked = tuple(site for site in cohort.sites if names.index(site) in keys)
            sent = yield Round("exchange", Gather(), fields, send, send_to, sites=asked, optional=True)
            mail = {}
            for site in sent:
                place, envelopes = names.index(site), sent[site]["mail"]
                if len(envelopes) != len(writes[place]):
                    raise ProtocolError(
                        "reply.shape", "a site sent other envelopes than one for each neighbour", field="mail",
                        remedy="the site does not keep the protocol: do not go on with it",
                    ).at(site=site)  # fmt: skip
                for j, envelope in zip(writes[place], envelopes, strict=True):
                    mail.setdefault(j, {})[place] = envelope
            if last or (number and number % p.report_every == 0):
                found = yield from self._told(model, sent.sites, p.rounds if last else number)
                history.append(found["loss"])
                used_up = yield Metrics(number, found)
            number += 1
            if not last and number % p.checkpoint_every == 0:
                yield Checkpoint(_kept(keys, mail, size, history, number, bool(used_up)))
        final = mixing(p.topology, len(names), number - 1)
        near, spread = connectivity(final), found.pop("energy") / max(found["sites"], 1)
        about = {
            "topology": p.topology, "spectral_gap": spectral_gap(mixing(p.topology, len(names))), **found,
            "from_mean_most": (spread / (2 * near)) ** 0.5 if near > 1e-9 else None,
        }  # fmt: skip
        return {"gossip": about, "history": history}

    def _told(self, model: Model, sites: tuple[str, ...], iteration: int) -> Steps:
        """One Sum over the sites that are at *iteration*: {"loss", "apart", "energy", "sites"}."""
        bounds = {"loss": self.params.clip, "energy": self._most(model), "pairs": 1.0}
        fields: dict[str, Declared] = {name: real(bound=most, step=fine(most)) for name, most in bounds.items()}
        send = {"iteration": np.array(iteration)}
        total = yield Round("report", Sum(), {**fields, "sites": count(bound=1)}, send, sites=sites)
        number, energy = max(int(total["sites"]), 1), max(float(total["energy"]), 0.0)
        pairs = float(total["pairs"])
        apart = (energy / pairs) ** 0.5 if pairs > 1e-9 else 0.0
        return {"loss": float(total["loss"]) / number, "apart": apart, "energy": energy, "sites": float(number)}

    def _most(self, model: Model) -> float:
        """Of a weighted squared distance between models, told as a number of one site."""
        return float(len(model.weights)) * max(self.params.clip, 1.0) ** 2

    def _envelope(self, model: Model) -> int:
        """Bytes of a model in its envelope."""
        return len(model.weights) * model.dtype.itemsize + SEAL_BYTES

    def _field(self, model: Model, sites: int) -> Declared:
        """Envelopes of one site, [neighbours, bytes]."""
        size, weights = self._envelope(model), mixing(self.params.topology, sites)
        most = max(len(told(weights, place)) for place in range(sites))
        return Declared("|u1", (None, size), 255, 1, limit_bytes=max(most, 1) * size)

    # -- at a site

    @handler("key", reduce="gather")
    def key(self, site: SiteView, task: Task) -> Reply:
        """At the site: its public key for this run, signed."""
        return {"key": np.frombuffer(site.mail.key, np.uint8)}

    @handler("exchange", reduce="gather")
    def exchange(self, site: SiteView, task: Task) -> Reply:
        """At the site: its model, sealed for each neighbour, after mixing in theirs and training on its own rows."""
        p, model, names, state = self.params, self.model(site.table.schema), site.mail.sites, site.state
        number, place = _whole(task, "iteration"), names.index(site.name)
        last = bool(_whole(task, "last"))
        if not int(state.get("iteration", -1)) < number <= p.rounds or (number == p.rounds and not last):
            raise ProtocolError(
                "task.changed", "a round of gossip is asked again, or is none of the plan's", field="iteration",
                remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        own = state.get("weights")
        if own is None:
            own = model.initial(_whole(task, "seed")).astype(model.dtype)
        keys = _keys(task, len(names))
        mixed = self._mixed(site, task, model, own, keys)
        if not last:
            mixed = mixed + self._change(site, task, model, own)
        state["weights"] = now = mixed.astype(model.dtype)
        state["iteration"] = np.array(p.rounds if last else number)
        if last:
            site.personal["weights"] = now.astype(np.float64)
            return {"mail": np.zeros((0, self._envelope(model)), np.uint8)}
        data = now.astype(model.dtype.newbyteorder("<")).tobytes()
        writes = told(mixing(p.topology, len(names), number + 1), place)
        sealed = [
            np.frombuffer(site.mail.seal(names[j], keys[j], STEP, number + 1, data), np.uint8)
            for j in writes if j in keys
        ]  # fmt: skip
        return {"mail": np.stack(sealed) if sealed else np.zeros((0, self._envelope(model)), np.uint8)}

    def _change(self, site: SiteView, task: Task, model: Model, own: Array) -> Array:
        """Of the site's own model by its own training, clipped."""
        p, examples = self.params, self._kept.examples(site.table)
        if not len(examples):
            site.state["loss"] = np.array(0.0)
            return np.zeros(len(own))
        check_groups({"weight": np.array(len(examples))}, frozenset({"weight"}), site.min_group_size)
        done = Local(p, model, examples, site, task, still(model, p.freeze)).sgd(own)
        site.state["loss"] = np.clip(np.array(done.loss), -p.clip, p.clip)
        change: Array = np.clip(np.asarray(done.weights, np.float64) - own, -p.clip, p.clip)
        return change

    def _mixed(self, site: SiteView, task: Task, model: Model, own: Array, keys: Mapping[int, bytes]) -> Array:
        """Σⱼ W_ij xⱼ over those whose envelopes came; notes how far they are from the site's own model."""
        p, names, number = self.params, site.mail.sites, _whole(task, "iteration")
        place, weights, mass = names.index(site.name), mixing(p.topology, len(names), number), 0.0
        size, reads = self._envelope(model), set(heard(weights, place)) if number else set()
        senders, sealed = _places(task, "senders", len(names)), task.arrays.get("mail")
        if sealed is None or sealed.dtype != np.uint8 or sealed.shape != (len(senders), size) or set(senders) - reads:
            raise not_taken("mail")
        theirs: dict[int, Array] = {}
        for j, envelope in zip(senders, sealed, strict=True):
            if j not in keys:
                raise not_taken("keys")
            data = site.mail.unseal(names[j], keys[j], STEP, number, envelope.tobytes(), size - SEAL_BYTES)
            heard_of = np.frombuffer(data, model.dtype.newbyteorder("<")).astype(np.float64)
            if np.isfinite(heard_of).all():  # else it is as if nothing came
                theirs[j] = heard_of
        row = without(weights[place], place, sorted(theirs))
        mixed: Array = row[place] * own.astype(np.float64)
        energy = 0.0
        for j, other in sorted(theirs.items()):
            mixed += row[j] * other
            energy += float(row[j] * np.sum((other - own) ** 2))
            mass += float(row[j])
        site.state["energy"] = np.array(min(energy, self._most(model)))
        site.state["pairs"] = np.array(mass)
        return mixed

    @handler("report")
    def report(self, site: SiteView, task: Task) -> Reply:
        """At the site: its mean loss, and how far its model is from its neighbours'."""
        if int(site.state.get("iteration", -1)) != _whole(task, "iteration"):  # else others' zeros would show one site
            raise not_taken("iteration")
        return {**{name: float(site.state[name]) for name in ("loss", "energy", "pairs")}, "sites": 1}


# ---------------------------------------------------------------- parcels: what the coordinator passes on


def _keyed(names: tuple[str, ...]) -> Steps:
    """Each site's key, by its place in the roster; of those that take part."""
    gathered = yield Round("key", Gather(), {"key": opaque(SIGNED_KEY_BYTES)}, optional=True)
    for site in gathered:
        if len(gathered[site]["key"]) != SIGNED_KEY_BYTES:
            raise ProtocolError("reply.shape", "a site's key is of another length", field="key").at(site=site)
    return {names.index(site): gathered[site]["key"] for site in gathered}


def _kept(
    keys: Mapping[int, Array], mail: Mapping[int, Mapping[int, Array]], size: int, history: list[float], number: int,
    used_up: bool,
) -> dict[str, Array]:  # fmt: skip
    """All that a coordinator has before round *number*: mail is by receiver and sender, and sealed."""
    waits = [(to, sender) for to in sorted(mail) for sender in sorted(mail[to])]
    return {
        "keys": _stacked([keys[place] for place in sorted(keys)], SIGNED_KEY_BYTES), "places": np.array(sorted(keys)),
        "mail": _stacked([mail[to][sender] for to, sender in waits], size),
        "waits": np.array(waits, np.int64).reshape(-1, 2), "history": np.array(history),
        "number": np.array(number), "used_up": np.array(int(used_up)),
    }  # fmt: skip


def _resumed(start: Mapping[str, Array]) -> Standing:
    """Inverse of :func:`_kept`."""
    mail: dict[int, dict[int, Array]] = {}
    for (to, sender), envelope in zip(start["waits"].tolist(), start["mail"], strict=True):
        mail.setdefault(to, {})[sender] = envelope
    keys = dict(zip(start["places"].tolist(), start["keys"], strict=True))
    return keys, mail, start["history"].tolist(), int(start["number"]), bool(start["used_up"])


def _parcel(keys: Mapping[int, Array], mail: Mapping[int, Array], writes: list[int], size: int) -> dict[str, Array]:
    """For one site: the envelopes that came for it, who sent them, and the keys of whom it hears or writes to."""
    senders, partners = sorted(mail), sorted({*mail, *writes})
    return {
        "mail": _stacked([mail[j] for j in senders], size), "senders": np.array(senders, np.int64),
        "keys": _stacked([keys[j] for j in partners], SIGNED_KEY_BYTES), "partners": np.array(partners, np.int64),
    }  # fmt: skip


def _stacked(rows: list[Array], size: int) -> Array:
    return np.stack(rows) if rows else np.zeros((0, size), np.uint8)


def _keys(task: Task, sites: int) -> dict[int, bytes]:
    """The signed keys that came with a task, by place in the roster."""
    partners, keys = _places(task, "partners", sites), task.arrays.get("keys")
    if keys is None or keys.dtype != np.uint8 or keys.shape != (len(partners), SIGNED_KEY_BYTES):
        raise not_taken("keys")
    return {place: key.tobytes() for place, key in zip(partners, keys, strict=True)}


def _places(task: Task, name: str, sites: int) -> list[int]:
    """Places in the roster, in order and each once."""
    places = task.arrays.get(name)
    if places is None or places.dtype != np.int64 or places.ndim != 1 or (np.diff(places) <= 0).any():
        raise not_taken(name)
    if len(places) and not 0 <= places[0] <= places[-1] < sites:
        raise not_taken(name)
    return [int(place) for place in places]


def _whole(task: Task, name: str) -> int:
    """A whole number that came with a task."""
    number = task.arrays.get(name)
    if number is None or number.shape != () or number.dtype != np.int64 or int(number) < 0:
        raise not_taken(name)
    return int(number)
