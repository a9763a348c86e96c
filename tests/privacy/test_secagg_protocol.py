"""The two halves of secure aggregation against each other, with a coordinator that does what it likes.

No runtime: :class:`Cohort` carries the exchanges, keeps each site's state as its journal would (only when the site
answered), and lets a test drop sites or change what they are sent.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, DisclosureError, IntegrityError, PolicyError, ProtocolError
from atoll.contract.protection import Choice, Exchange, Terms
from atoll.contract.rounds import Field, Round, Sum, Summed, count, real
from atoll.crypto import shamir
from atoll.crypto.identity import Identity
from atoll.crypto.prg import KEY_BYTES, Stream
from atoll.crypto.session import Session, claim
from atoll.privacy.fixed_point import Layout, add_masks, add_to
from atoll.privacy.secagg import agreement, masking
from atoll.privacy.secagg.agreement import dense
from atoll.privacy.secagg.graph import degree, holders, neighbours, threshold
from atoll.privacy.secagg.masking import SecAgg
from atoll.runtime.party import Own
from atoll.runtime.policy import Policy

STEPS = ("shares", "reply", "agree", "unmask")
FIELDS = {"x": real(3, bound=1000, step=1e-6), "n": count(bound=1000)}
Arrays = dict[str, np.ndarray]
SECAGG = SecAgg()


@dataclass
class Received:
    """A reply in memory (see ``atoll.contract.protection.Received``)."""

    arrays: Arrays

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        flat = self.arrays[name].reshape(-1)
        for start in range(0, flat.size, 6):
            yield start, flat[start : start + 6]


@dataclass
class Cohort:
    """Sites with identities, session keys and states, and what a coordinator does with them."""

    size: int
    adversary: str = "curious"
    min_sites: int = 1
    policy: Policy = field(default_factory=Policy.sandbox)
    run: str = "run"
    some: tuple[str, ...] | None = None
    """The round's cohort, where it is not all."""
    fields: Mapping[str, Field] = field(default_factory=lambda: FIELDS)
    sent: dict[tuple[str, str], Arrays] = field(default_factory=dict)
    told: dict[tuple[str, str], Arrays] = field(default_factory=dict)
    """What each site was sent, and what it answered, in each step of the last round."""

    def __post_init__(self) -> None:
        self.names = [f"s{i:03}" for i in range(self.size)]
        self.identities = {name: Identity.generate(name) for name in self.names}
        self.roster = {name: self.identities[name].public for name in self.names}
        self.states: dict[str, Arrays] = {name: {} for name in self.names}
        self.new_sessions()

    def new_sessions(self) -> None:
        self.private = {name: Session(Session.fresh()) for name in self.names}
        self.sessions = {n: self.signed_session(n, self.private[n].public) for n in self.names}

    def signed_session(self, name: str, public: bytes, signer: str = "", run: str = "") -> bytes:
        return public + self.identities[signer or name].sign(claim(run or self.run, "roster", name, public))

    def terms(self, number: int = 0, attempt: int = 0, question: str = "q") -> Terms:
        choice = Choice(sum="secagg", adversary=self.adversary)
        return Terms(self.run, number, attempt, self.roster, "roster", self.min_sites, choice, question, self.some)

    def reply(self, name: str, number: int = 0) -> Arrays:
        random = np.random.default_rng([number, *name.encode()])
        return {"x": random.uniform(-1000, 1000, 3), "n": random.integers(0, 1000, ())}

    def total(self, names: Collection[str], number: int = 0) -> Arrays:
        replies = [self.reply(name, number) for name in names]
        return {key: np.sum([reply[key] for reply in replies], axis=0) for key in self.fields}

    def ask(self, name: str, step: str, sent: Arrays, terms: Terms, reply: Arrays | None = None) -> Arrays:
        """One site's answer. Its state is kept when it answers, as the journal keeps it with the release."""
        state = dict(self.states[name])
        own = Own(name, terms, self.private[name], sent, state, self.identities[name].sign, self.policy)
        answer = SECAGG.answer(step, own, reply or {}, self.fields)
        self.states[name] = state
        return answer

    def aggregate(
        self, number: int = 0, attempt: int = 0, gone: Mapping[str, Collection[str]] | None = None,
        change: Callable[[str, str, Arrays], Arrays] = lambda step, name, sent: sent,
        lie: Callable[[str, str, Arrays], Arrays] = lambda step, name, answer: answer,
        question: Callable[[str], str] = lambda name: "q", until: str = "",
    ) -> Summed:  # fmt: skip
        """One round. gone: who drops out before answering a step. change: what a site is sent; lie: what it answers.
        until: stop after this step (StopIteration)."""
        terms = self.terms(number, attempt)
        combining = SECAGG.combine(Round("r", Sum(), self.fields), terms.cohort, terms, self.sessions)
        step: Exchange | Summed = next(combining)
        lost: set[str] = set()
        while isinstance(step, Exchange):
            lost |= set((gone or {}).get(step.step, ()))
            replies = {}
            for name in step.sites:
                if name in lost:
                    continue
                sent = change(step.step, name, {**step.send, **step.send_to.get(name, {})})
                self.sent[step.step, name] = sent
                mine = self.terms(number, attempt, question(name))
                given = self.reply(name, number) if step.step == "reply" else None
                answer = lie(step.step, name, self.ask(name, step.step, sent, mine, given))
                self.told[step.step, name] = answer
                assert {n: (a.dtype.str, a.shape) for n, a in answer.items()} == {
                    n: (f.dtype, f.shape) for n, f in step.fields.items()
                }
                replies[name] = Received(answer)
            if step.step == until:
                raise StopIteration
            try:
                step = combining.send(replies)
            except StopIteration as stop:
                step = stop.value
        return step

    def up_to(self, step: str, number: int = 0, attempt: int = 0, **more: Any) -> None:
        """The round's steps up to and with *step*."""
        with pytest.raises(StopIteration):
            self.aggregate(number, attempt, until=step, **more)


def exact(found: Summed, wanted: Arrays, sites: int) -> None:
    assert found.arrays["n"] == wanted["n"]
    assert np.abs(found.arrays["x"] - wanted["x"]).max() <= sites * 0.5e-6 * (1 + 1e-6)


def refused(kind: type[AtollError], code: str, act: Callable[[], Any], field: str | None = None) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.code == code
    assert field is None or caught.value.field == field


# ---------------------------------------------------------------- the sum, whoever drops out


@pytest.mark.parametrize("adversary", ["curious", "active"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_sum_of_everybody(size: int, adversary: str) -> None:
    cohort = Cohort(size, adversary)
    found = cohort.aggregate()
    exact(found, cohort.total(cohort.names), size)
    assert found.sites == tuple(cohort.names)


@pytest.mark.parametrize("adversary", ["curious", "active"])
@pytest.mark.parametrize("step", STEPS)
def test_dropouts_down_to_the_threshold_and_below_it(step: str, adversary: str) -> None:
    """With every number of dropouts that leaves enough: the survivors' exact sum. With one more: the round fails, and
    nobody opened a share."""
    size = 9
    needed = threshold(size, adversary)
    for lost in range(1, size - needed + 1):
        cohort = Cohort(size, adversary)
        away = cohort.names[1 : 1 + lost]
        there = [name for name in cohort.names if name not in away] if STEPS.index(step) < 2 else cohort.names
        found = cohort.aggregate(gone={step: away})
        assert found.sites == tuple(there)
        exact(found, cohort.total(there), size)
    cohort = Cohort(size, adversary)
    with pytest.raises(AtollError) as caught:
        cohort.aggregate(gone={step: cohort.names[1 : 2 + size - needed]})
    assert caught.value.code == "secagg.too-few"
    if step != "unmask":
        assert not [at for at in cohort.told if at[0] == "unmask"]
    else:  # some opened their shares, and they are fewer than make a secret
        assert len([at for at in cohort.told if at[0] == "unmask"]) == needed - 1


def test_some_at_every_step() -> None:
    cohort = Cohort(12)
    s = cohort.names
    found = cohort.aggregate(gone={"shares": s[:1], "reply": s[1:3], "agree": s[3:4], "unmask": s[4:5]})
    assert found.sites == tuple(s[3:])
    exact(found, cohort.total(s[3:]), 12)


def test_round_after_round_with_sites_that_come_back() -> None:
    cohort = Cohort(6)
    for number, step in enumerate([*STEPS, *STEPS]):
        away = cohort.names[number % 6]
        found = cohort.aggregate(number, gone={step: [away]})
        there = [name for name in cohort.names if name != away or step in ("agree", "unmask")]
        exact(found, cohort.total(there, number), 6)


def test_elements_at_their_bounds() -> None:
    cohort = Cohort(5)
    cohort.reply = lambda name, number=0: {"x": np.array([1000.0, -1000, 1000]), "n": np.array(1000)}  # type: ignore[method-assign]
    found = cohort.aggregate(gone={"reply": cohort.names[:1]})
    assert found.arrays["x"].tolist() == [4000, -4000, 4000] and found.arrays["n"] == 4000


@pytest.mark.parametrize(("size", "adversary"), [(70, "curious"), (70, "active"), (120, "curious")])
def test_a_sparse_graph_with_a_sixth_dropping_out(size: int, adversary: str) -> None:
    cohort = Cohort(size, adversary)
    assert degree(size, adversary) < size - 1
    away = cohort.names[3 : size - 3 : 6]
    gone = {step: away[i::4] for i, step in enumerate(STEPS)}
    there = [n for n in cohort.names if n not in {*gone["shares"], *gone["reply"]}]
    found = cohort.aggregate(gone=gone)
    assert found.sites == tuple(there)
    exact(found, cohort.total(there), size)


@pytest.mark.parametrize("adversary", ["curious", "active"])
def test_a_sum_among_some_survives_what_their_number_allows(adversary: str) -> None:
    cohort = Cohort(9, adversary, some=("s001", "s004", "s005", "s007"))
    found = cohort.aggregate(gone={"reply": ["s004"]})
    assert found.sites == ("s001", "s005", "s007")
    exact(found, cohort.total(found.sites), 4)
    cohort.some = ("s000", "s002", "s004")
    exact(cohort.aggregate(1), cohort.total(cohort.some, 1), 3)


def test_a_round_begun_anew_among_others_has_no_second_sum() -> None:
    """Of the same number of sites: what each signed names them, not their places."""
    cohort = Cohort(6, some=("s000", "s001", "s002", "s003"))
    cohort.up_to("agree")
    cohort.some = ("s000", "s001", "s002", "s004")
    refused(DisclosureError, "disclosure.cohort-differencing", lambda: cohort.aggregate(0, 1), "agree")


# ---------------------------------------------------------------- what is told


def test_no_masked_vector_is_near_its_values() -> None:
    cohort = Cohort(5)
    cohort.aggregate()
    layout = Layout.of(FIELDS, 5)
    for name in cohort.names:
        for ring, vector in layout.encode(cohort.reply(name)).items():
            assert (cohort.told["reply", name][ring] != vector).all()


def test_of_each_site_one_secret_is_opened_and_never_both() -> None:
    """Every share that leaves in "unmask" is of the self mask of a survivor, or of the mask key of one that is not."""
    cohort = Cohort(7)
    kept: dict[str, Arrays] = {}
    away = set(cohort.names[:2])

    def look(step: str, name: str, sent: Arrays) -> Arrays:
        if step == "unmask":
            kept[name] = dict(cohort.states[name])
        return sent

    cohort.aggregate(gone={"reply": away}, change=look)
    assert kept.keys() == set(cohort.names) - away
    for name, state in kept.items():
        around = neighbours(cohort.terms())[name]
        for other, row in zip((name, *around), cohort.told["unmask", name]["shares"], strict=True):
            both = state["own"] if other == name else state[f"share {other}"]
            key, seed = both[:KEY_BYTES], both[KEY_BYTES:]
            assert np.array_equal(row, key if other in away else seed)
            assert not np.array_equal(key, seed)
        assert set(cohort.states[name]) == {"at", "signed"}  # and what it knew is forgotten


def test_secrets_are_forgotten_when_the_vector_leaves() -> None:
    cohort = Cohort(4)
    cohort.up_to("reply")
    for state in cohort.states.values():
        assert not {"private", "seed"} & set(state) and not [name for name in state if name.startswith("session ")]


def test_a_late_vector_stays_hidden() -> None:
    """It arrives after the survivors were agreed on: its pair masks can be taken off, its self mask cannot."""
    cohort = Cohort(5)
    late = cohort.names[2]
    found = cohort.aggregate(gone={"reply": [late]})
    assert late not in found.sites
    around, adverts = neighbours(cohort.terms()), {n: cohort.told["shares", n]["advert"] for n in cohort.names}
    sent = dense("adverts", masking.ADVERT_BYTES, around[late], adverts)
    place = {n: around[n].index(late) for n in around[late]}
    envelopes = {n: cohort.told["shares", n]["sealed"][place[n]] for n in around[late]}
    sent |= dense("sealed", masking.SEALED_BYTES, around[late], envelopes)
    seed = cohort.states[late]["seed"].tobytes()
    vector = cohort.ask(late, "reply", sent, cohort.terms(), cohort.reply(late))

    shares = {
        holders(late, around[late])[n]: cohort.told["unmask", n]["shares"][1 + around[n].index(late)].tobytes()
        for n in around[late]
    }
    key = Session(shamir.combine(shares))
    assert key.public == adverts[late][:KEY_BYTES].tobytes()  # its mask key is out, as it must be
    plus, minus = [], []
    for other in around[late]:
        mask = Stream(key.pair(adverts[other][:KEY_BYTES].tobytes(), *cohort.terms().label("mask")))
        (minus if late < other else plus).append(mask)
    bare = Layout.of(FIELDS, 5).encode(cohort.reply(late))
    add_masks(vector, plus, minus)
    assert all((vector[ring] != bare[ring]).all() for ring in bare)
    add_masks(vector, [], [masking._self_mask(seed, cohort.terms())])  # which only the site could
    assert all(np.array_equal(vector[ring], bare[ring]) for ring in bare)
    refused(
        ProtocolError,
        "secagg.survivors",
        lambda: cohort.ask(late, "agree", cohort.sent["agree", cohort.names[0]], cohort.terms()),
    )


def test_no_mask_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over runs, rounds and attempts: every pair's key once at each of the two, every self mask's once."""
    used: Counter[bytes] = Counter()

    def recorded(key: bytes) -> Stream:
        used[key] += 1
        return Stream(key)

    monkeypatch.setattr(masking, "Stream", recorded)
    cohort = Cohort(4)
    times = 0
    for run in ("one", "two"):
        cohort.run = run
        cohort.states = {name: {} for name in cohort.names}
        cohort.new_sessions()
        for number, attempt in ((0, 0), (0, 1), (1, 0), (1, 3), (2, 0)):
            cohort.up_to("reply", number, attempt)
            times += 1
    assert Counter(used.values()) == {1: 4 * times, 2: 6 * times}


def test_the_same_reply_is_masked_anew_each_time() -> None:
    cohort = Cohort(4)
    vectors = []
    cohort.reply = lambda name, number=0: {"x": np.ones(3), "n": np.array(7)}  # type: ignore[method-assign]
    for number, attempt in ((0, 0), (0, 1), (1, 0)):
        cohort.up_to("reply", number, attempt)
        vectors += [cohort.told["reply", name]["ring64"] for name in cohort.names]
    for one, other in itertools.combinations(vectors, 2):
        assert (one != other).all()


def test_shares_of_colluding_sites_below_the_threshold_make_no_secret() -> None:
    """t − 1 sites that show the coordinator everything they hold: no key and no seed of another comes out."""
    cohort = Cohort(9)
    cohort.up_to("reply")
    needed = threshold(9, "curious")
    victim, colluding = cohort.names[0], cohort.names[1:needed]
    number = holders(victim, neighbours(cohort.terms())[victim])
    held = {number[name]: cohort.states[name][f"share {victim}"].tobytes() for name in colluding}
    advert = cohort.told["shares", victim]["advert"].tobytes()
    secret = shamir.combine(held)
    assert Session(secret[:KEY_BYTES]).public != advert[:KEY_BYTES]
    assert masking._commitment(secret[KEY_BYTES:]) != advert[KEY_BYTES : 2 * KEY_BYTES]
    another = cohort.names[needed]  # and with one more they would
    secret = shamir.combine({**held, number[another]: cohort.states[another][f"share {victim}"].tobytes()})
    assert Session(secret[:KEY_BYTES]).public == advert[:KEY_BYTES]


# ---------------------------------------------------------------- a coordinator that changes things


def flip(name: str, row: int | None = None) -> Callable[[Arrays], Arrays]:
    """One bit of an array (of one row) the other way."""

    def flipped(sent: Arrays) -> Arrays:
        array = sent[name].copy()
        array[() if row is None else row].reshape(-1)[-1] ^= 1
        return {**sent, name: array}

    return flipped


def at(step: str, name: str, act: Callable[[Arrays], Arrays]) -> Callable[[str, str, Arrays], Arrays]:
    """Change only what one site is sent (or answers) in one step."""
    return lambda now, who, arrays: act(arrays) if (now, who) == (step, name) else arrays


def swap(name: str, one: int, other: int) -> Callable[[Arrays], Arrays]:
    def swapped(sent: Arrays) -> Arrays:
        array = sent[name].copy()
        array[[one, other]] = array[[other, one]]
        return {**sent, name: array}

    return swapped


@pytest.mark.parametrize(
    ("step", "act", "code"),
    [
        ("shares", flip("sessions", 1), "session.not-signed"),
        ("shares", swap("sessions", 0, 1), "session.not-signed"),
        ("reply", flip("adverts", 2), "secagg.signature"),
        ("reply", swap("adverts", 0, 2), "secagg.signature"),
        ("reply", flip("sealed", 0), "envelope.altered"),
        ("reply", swap("sealed", 0, 1), "envelope.altered"),
        ("unmask", flip("signatures", 3), "secagg.signature"),
        ("unmask", swap("signatures", 0, 1), "secagg.signature"),
    ],
)  # fmt: skip
def test_what_is_altered_or_swapped_on_its_way_is_refused(step: str, act: Any, code: str) -> None:
    cohort = Cohort(5)
    refused(IntegrityError, code, lambda: cohort.aggregate(change=at(step, "s004", act)))
    assert ("unmask", "s004") not in cohort.told


def test_everything_of_an_earlier_round_or_attempt_is_refused() -> None:
    """Adverts, envelopes, and signatures: all of a round before, put into this one."""
    for number, attempt in ((1, 0), (0, 1)):
        for step, names, code in (
            ("reply", ("adverts",), "secagg.signature"), ("reply", ("sealed",), "envelope.altered"),
            ("unmask", ("signatures",), "secagg.signature"),
        ):  # fmt: skip
            cohort = Cohort(4)
            cohort.aggregate()
            old = dict(cohort.sent)

            def replay(sent: Arrays, old: Any = old, step: str = step, names: Any = names) -> Arrays:
                return {**sent, **{name: old[step, "s001"][name] for name in names}}

            with pytest.raises(IntegrityError) as caught:
                cohort.aggregate(number, attempt, change=at(step, "s001", replay))
            assert caught.value.code == code


def test_a_session_key_of_an_earlier_run_is_refused() -> None:
    cohort = Cohort(4)
    public = Session(Session.fresh()).public
    cohort.sessions["s002"] = cohort.signed_session("s002", public, run="an earlier run")
    refused(IntegrityError, "session.not-signed", cohort.aggregate, "s002")


def test_a_site_with_another_identity_is_refused() -> None:
    """The coordinator, which runs the CA, makes up a site in place of one on the roster."""
    cohort = Cohort(4)
    invented = Identity.generate("s002")
    public = Session(Session.fresh()).public
    cohort.sessions["s002"] = public + invented.sign(claim(cohort.run, "roster", "s002", public))
    refused(IntegrityError, "session.not-signed", cohort.aggregate, "s002")

    def invent(step: str, name: str, answer: Arrays) -> Arrays:
        if (step, name) != ("shares", "s002"):
            return answer
        body = Session(Session.fresh()).public + answer["advert"][KEY_BYTES : 2 * KEY_BYTES].tobytes()
        signature = invented.sign(masking._advert(cohort.terms(), "s002", body))
        return {**answer, "advert": np.frombuffer(body + signature, np.uint8)}

    cohort = Cohort(4)
    refused(IntegrityError, "secagg.signature", lambda: cohort.aggregate(lie=invent), "s002")


def test_sites_that_are_asked_in_different_words_refuse() -> None:
    """Else the reply of one could be added to replies that the coordinator knows (Pasquini et al. 2022, CCS)."""
    cohort = Cohort(5)
    words = lambda name: "of everybody" if name != "s003" else "of one alone"  # noqa: E731
    refused(IntegrityError, "secagg.signature", lambda: cohort.aggregate(question=words))
    assert not [at for at in cohort.told if at[0] in ("agree", "unmask")]


# ---------------------------------------------------------------- the survivors


def survivors(cohort: Cohort, *there: str) -> Arrays:
    return {"survivors": np.array([name in there for name in cohort.names], np.uint8)}


def test_sets_of_survivors_that_are_not_signed() -> None:
    cohort = Cohort(6, policy=Policy.sandbox().model_copy(update={"min_sites": 5}))
    s, ask = cohort.names, lambda sent: lambda: cohort.ask(s[0], "agree", sent, cohort.terms())
    cohort.up_to("reply", gone={"shares": s[5:]})
    refused(ProtocolError, "secagg.survivors", ask(survivors(cohort, *s[1:5])), s[0])  # without the site itself
    refused(ProtocolError, "secagg.survivors", ask(survivors(cohort, *s)), s[5])  # with one that never shared a key
    refused(AtollError, "secagg.too-few", ask(survivors(cohort, *s[:3])))
    refused(PolicyError, "policy.too-few-survivors", ask(survivors(cohort, *s[:4])))
    malformed = (
        {}, {"survivors": np.ones(5, np.uint8)}, {"survivors": np.ones(6)}, {"survivors": np.ones((6, 1), np.uint8)},
    )  # fmt: skip
    for sent in malformed:
        refused(ProtocolError, "secagg.survivors", ask(sent))
    assert "agreed" not in cohort.states[s[0]]
    assert cohort.ask(s[0], "agree", survivors(cohort, *s[:5]), cohort.terms())


def test_a_plans_least_number_of_sites_is_kept_by_each_site() -> None:
    cohort = Cohort(6, min_sites=5)
    cohort.up_to("reply")
    ask = lambda: cohort.ask("s000", "agree", survivors(cohort, *cohort.names[:4]), cohort.terms())  # noqa: E731
    refused(AtollError, "secagg.too-few", ask, "agree")


def test_two_sets_of_survivors_are_not_opened() -> None:
    """A coordinator that tells half the cohort one set and half another gets no set enough signatures for anybody."""
    cohort = Cohort(6)
    cohort.up_to("reply")
    one, other = survivors(cohort, *cohort.names[:5]), survivors(cohort, *cohort.names[1:])
    signed = {
        n: cohort.ask(n, "agree", one if n < "s003" else other, cohort.terms())["signature"] for n in cohort.names
    }
    for chosen in (cohort.names, cohort.names[:3], cohort.names[3:]):
        sent = dense("signatures", 64, cohort.names, {n: signed[n] for n in chosen})
        for name in cohort.names:
            with pytest.raises(AtollError) as caught:
                cohort.ask(name, "unmask", sent, cohort.terms())
            assert caught.value.code in ("secagg.signature", "secagg.too-few")


@pytest.mark.parametrize("adversary", ["curious", "active"])
def test_signatures_below_the_threshold_open_nothing(adversary: str) -> None:
    cohort = Cohort(7, adversary)
    cohort.up_to("agree")
    signed = {n: cohort.told["agree", n]["signature"] for n in cohort.names}
    needed = threshold(7, adversary)
    few = dense("signatures", 64, cohort.names, dict(itertools.islice(signed.items(), needed - 1)))
    refused(AtollError, "secagg.too-few", lambda: cohort.ask("s000", "unmask", few, cohort.terms()), "unmask")
    enough = dense("signatures", 64, cohort.names, dict(itertools.islice(signed.items(), needed)))
    assert cohort.ask("s000", "unmask", enough, cohort.terms())["shares"].shape == (7, KEY_BYTES)


def test_signatures_of_sites_that_did_not_survive_do_not_count() -> None:
    cohort = Cohort(7)
    s = cohort.names
    cohort.up_to("reply")
    sent = survivors(cohort, *s[:4])
    signed = {n: cohort.ask(n, "agree", sent, cohort.terms())["signature"] for n in s[:3]}
    about = agreement._claim(cohort.terms(), sent["survivors"])
    signed |= {n: np.frombuffer(cohort.identities[n].sign(about), np.uint8) for n in s[4:]}  # three that collude
    told = dense("signatures", 64, s, signed)
    refused(AtollError, "secagg.too-few", lambda: cohort.ask(s[0], "unmask", told, cohort.terms()))


def test_a_round_begun_anew_is_of_the_same_survivors_or_of_none() -> None:
    cohort = Cohort(7)
    s = cohort.names
    cohort.up_to("agree", 0, 0, gone={"reply": s[6:]})
    refused(DisclosureError, "disclosure.cohort-differencing", lambda: cohort.aggregate(0, 1), "agree")
    refused(
        DisclosureError, "disclosure.cohort-differencing", lambda: cohort.aggregate(0, 2, gone={"reply": s[3:6][:2]})
    )
    found = cohort.aggregate(0, 3, gone={"reply": s[6:]})
    exact(found, cohort.total(s[:6]), 7)
    refused(DisclosureError, "disclosure.cohort-differencing", lambda: cohort.aggregate(0, 4))
    exact(cohort.aggregate(1), cohort.total(s, 1), 7)
    refused(ProtocolError, "secagg.order", lambda: cohort.aggregate(0, 5))  # nor by way of another round


# ---------------------------------------------------------------- steps out of order, and malformed


def test_steps_out_of_order() -> None:
    cohort = Cohort(4)
    cohort.aggregate(3, 1)
    sent = {step: cohort.sent[step, "s000"] for step in STEPS}

    def ask(step: str, number: int = 4, attempt: int = 0) -> Callable[[], Any]:
        return lambda: cohort.ask("s000", step, sent[step], cohort.terms(number, attempt), cohort.reply("s000"))

    def all_refused(*asked: Callable[[], Any]) -> None:
        for one in asked:
            refused(ProtocolError, "secagg.order", one)

    all_refused(*(ask(step, 3, 1) for step in STEPS))  # over
    all_refused(ask("shares", 3, 0), ask("shares", 2, 7))  # before
    all_refused(*(ask(step) for step in STEPS[1:]))  # not begun
    cohort.up_to("shares", 4)
    sent |= {"shares": cohort.sent["shares", "s000"]}
    all_refused(ask("shares"), ask("agree"), ask("unmask"), ask("reply", 4, 1), ask("reply", 5))
    cohort.up_to("reply", 5)
    sent |= {"reply": cohort.sent["reply", "s000"]}
    all_refused(ask("shares", 5), ask("reply", 5), ask("unmask", 5), ask("agree", 5, 1))
    cohort.up_to("agree", 6)
    sent |= {"reply": cohort.sent["reply", "s000"], "agree": cohort.sent["agree", "s000"]}
    all_refused(ask("shares", 6), ask("reply", 6), ask("agree", 6), ask("unmask", 6, 1))
    all_refused(lambda: cohort.ask("s000", "hello", {}, cohort.terms(7)))


def test_a_neighbour_that_was_not_there_when_shares_were_made() -> None:
    """A site that comes back within the round cannot be put among those whose vectors are masked."""
    cohort = Cohort(5)
    cohort.up_to("shares", gone={"shares": ["s004"]})
    late = {**cohort.sessions}
    about = {n: np.frombuffer(late[n], np.uint8) for n in cohort.names if n not in ("s004", "s000")}
    told = dense("sessions", 96, cohort.names[:4], about)
    answer = cohort.ask("s004", "shares", told, cohort.terms())  # it was not told of s000
    adverts = {n: cohort.told["shares", n]["advert"] for n in cohort.names[:4]} | {"s004": answer["advert"]}
    envelopes = {n: cohort.told["shares", n]["sealed"][0] for n in cohort.names[1:4]} | {"s004": answer["sealed"][0]}
    sent = dense("adverts", masking.ADVERT_BYTES, cohort.names[1:], adverts)
    sent |= dense("sealed", masking.SEALED_BYTES, cohort.names[1:], envelopes)
    refused(
        IntegrityError,
        "envelope.altered",
        lambda: cohort.ask("s000", "reply", sent, cohort.terms(), cohort.reply("s000")),
    )


@pytest.mark.parametrize(
    ("step", "name"), [("shares", "sessions"), ("reply", "adverts"), ("reply", "sealed"), ("unmask", "signatures")]
)
def test_malformed_arrays(step: str, name: str) -> None:
    for change in (
        lambda a: None, lambda a: a[:-1], lambda a: a[:, :-1], lambda a: a.astype(np.int64), lambda a: a.reshape(-1),
        lambda a: a.astype(np.float64), lambda a: np.concatenate([a, a]),
    ):  # fmt: skip

        def act(sent: Arrays, change: Any = change) -> Arrays:
            changed = change(sent[name])
            return {**{k: v for k, v in sent.items() if k != name}, **({} if changed is None else {name: changed})}

        cohort = Cohort(4)
        refused(
            ProtocolError, "secagg.malformed", lambda c=cohort, a=act: c.aggregate(change=at(step, "s001", a)), name
        )
        cohort = Cohort(4)
        without = at(step, "s001", lambda sent: {k: v for k, v in sent.items() if k != f"{name} of"})
        refused(ProtocolError, "secagg.malformed", lambda c=cohort, w=without: c.aggregate(change=w), name)


def test_too_few_neighbours_at_a_site() -> None:
    """The coordinator shows one site fewer others than there are: below the threshold it does not mask at all."""

    def hide(name: str, how_many: int) -> Callable[[Arrays], Arrays]:
        def hidden(sent: Arrays) -> Arrays:
            there = sent[f"{name} of"].copy()
            there[:how_many] = 0
            return {**sent, f"{name} of": there}

        return hidden

    for step, name in (("shares", "sessions"), ("reply", "adverts")):
        cohort = Cohort(6)
        change = at(step, "s005", hide(name, 3))
        refused(AtollError, "secagg.too-few", lambda c=cohort, x=change: c.aggregate(change=x), step)


# ---------------------------------------------------------------- sites that lie


def test_one_wrong_share_does_no_harm_when_others_are_enough() -> None:
    cohort = Cohort(7)
    found = cohort.aggregate(gone={"reply": cohort.names[:1]}, lie=at("unmask", "s003", flip("shares")))
    exact(found, cohort.total(cohort.names[1:]), 7)


def test_wrong_shares_of_too_many_are_noticed() -> None:
    cohort = Cohort(7)
    lie = lambda step, name, answer: flip("shares", 0)(answer) if step == "unmask" else answer  # noqa: E731
    wrong = lambda step, name, answer: (  # noqa: E731
        {"shares": answer["shares"] ^ np.uint8(1)} if step == "unmask" and name > "s002" else answer
    )
    refused(IntegrityError, "secagg.bad-share", lambda: cohort.aggregate(lie=wrong), "unmask")
    exact(Cohort(7).aggregate(lie=lie), cohort.total(cohort.names), 7)  # each of its own: one wrong of seven


def test_a_site_that_shares_what_it_did_not_commit_to() -> None:
    """Its commitment is to another seed: no sum, rather than a wrong one."""
    cohort = Cohort(5)

    def lie(step: str, name: str, answer: Arrays) -> Arrays:
        if (step, name) != ("shares", "s002"):
            return answer
        body = answer["advert"][:KEY_BYTES].tobytes() + bytes(KEY_BYTES)
        signature = cohort.identities[name].sign(masking._advert(cohort.terms(), name, body))
        return {**answer, "advert": np.frombuffer(body + signature, np.uint8)}

    refused(IntegrityError, "secagg.bad-share", lambda: cohort.aggregate(lie=lie))


@pytest.mark.parametrize("field", ["x", "n"])
def test_a_sum_that_no_honest_sites_can_come_to_is_refused(field: str) -> None:
    cohort = Cohort(5)
    ring = {"x": "ring64", "n": "ring32"}[field]

    def lie(step: str, name: str, answer: Arrays) -> Arrays:
        if (step, name) != ("reply", "s002"):
            return answer
        return {**answer, ring: answer[ring] + answer[ring].dtype.type(2 ** (29 if field == "n" else 60))}

    refused(ProtocolError, "reply.bound", lambda: cohort.aggregate(lie=lie), field)


def test_128_bit_rings_survive_dropouts() -> None:
    fields = {"x": real(3, bound=1e20, step=1e-6), "n": count(bound=1000)}
    cohort = Cohort(5, fields=fields)
    found = cohort.aggregate(gone={"reply": ["s001"], "unmask": ["s003"]})
    there = [n for n in cohort.names if n != "s001"]
    assert found.arrays["n"] == cohort.total(there)["n"]
    assert np.allclose(found.arrays["x"], cohort.total(there)["x"], rtol=1e-12, atol=1e-5)
    vector = cohort.told["reply", "s000"]["ring128"]
    total = vector.copy()
    add_to(total, vector)
    add_to(total, vector, minus=True)
    assert np.array_equal(total, vector)
