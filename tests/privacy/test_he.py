"""Homomorphic encryption in a whole federation: the same numbers as plain, whoever drops out but the key holder."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, IntegrityError, PlanError, ProtocolError, TransportError
from atoll.contract.protection import OWN, Choice
from atoll.contract.protection import find as protection_of
from atoll.contract.rounds import Field, count, real
from atoll.contract.wire import Message, decode
from atoll.crypto.ckks import error_bound
from atoll.crypto.paillier import PrivateKey
from atoll.data.table import Table
from atoll.privacy.he.key_holder import claim
from atoll.privacy.he.limbs import Limbs
from atoll.privacy.he.slots import Slots
from atoll.runtime.roster import agreement
from atoll.runtime.site import Site
from atoll.runtime.study import check_plan
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [-50, 100]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
PAILLIER: dict[str, Any] = {"sum": "paillier", "key_bits": 2048}
CKKS: dict[str, Any] = {"sum": "ckks"}
BOTH = pytest.mark.parametrize("protection", [PAILLIER, CKKS], ids=["paillier", "ckks"])


def tables_of(federation: Any, sites: int = 4, rows: int = 40) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x + random.normal(0, 9, rows) > i).astype(float)}, COLUMNS)
    return made


def glm(federation: Any, tables: Mapping[str, Table], protection: Any, **more: Any) -> Any:
    params = {"family": "logistic", "target": "sick", "features": ["x"]}
    return federation.plan("horizontal.glm", params, tables, protection=protection, **more)


def described(federation: Any, tables: Mapping[str, Table], protection: Any) -> Any:
    plan = federation.plan("statistics.describe", {"columns": ["x", "sick"]}, tables, protection=protection)
    return federation.run(plan, tables)["result"]


def weights(federation: Any, tables: Mapping[str, Table], left: tuple[str, ...]) -> Any:
    """Of the model that plain fits to some of the sites."""
    some = {name: tables[name] for name in left}
    return federation.run(glm(federation, some, "plain"), some)["result"]["model"].weights


def gone_at(step: str, who: tuple[str, ...], number: int = 1) -> Any:
    """Sites *who* cannot be reached from *step* of round *number* on."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        lost = False

        def handle(message: Message, progress: Progress) -> Message:
            nonlocal lost
            at = (message.meta.get("round"), message.meta.get("step"))
            lost = lost or (name in who and at == (number, step))
            if lost:
                raise TransportError("link.lost", "gone", field=name)
            return endpoint(message, progress)

        return handle

    return wrap


def changed_at(step: str, site: str, change: Callable[[dict[str, Any], Message], None]) -> Any:
    """A coordinator that sends *site* other arrays in *step*; they are *change*d in place."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            if name == site and message.meta.get("step") == step:
                arrays = {key: np.array(value) for key, value in message.arrays.items()}
                change(arrays, message)
                message = Message(message.kind, message.meta, arrays)
            return endpoint(message, progress)

        return handle

    return wrap


def run_fails(federation: Any, plan: Any, tables: Mapping[str, Table], **options: Any) -> AtollError:
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables, **options)
    return caught.value


def only_numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for key in sorted(value, key=str) for number in only_numbers(value[key])]
    if isinstance(value, list | tuple | np.ndarray):
        return [number for each in value for number in only_numbers(each)]
    return [float(value)] if isinstance(value, int | float | np.number) else []


# ---------------------------------------------------------------- the same numbers


@BOTH
def test_it_gives_what_plain_gives(federation: Any, protection: Any) -> None:
    tables = tables_of(federation)
    plain = federation.run(glm(federation, tables, "plain"), tables)["result"]
    hidden = federation.run(glm(federation, tables, protection), tables)["result"]
    assert hidden["rows"] == plain["rows"] == 160
    assert np.allclose(hidden["model"].weights, plain["model"].weights, rtol=0, atol=1e-8)


@BOTH
def test_describe_and_two_sites(federation: Any, protection: Any) -> None:
    tables = tables_of(federation, sites=2)
    plain = only_numbers(described(federation, tables, "plain"))
    hidden = only_numbers(described(federation, tables, protection))
    assert len(plain) > 10
    assert np.allclose(hidden, plain, rtol=1e-6, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------- dropouts


@pytest.mark.parametrize(
    ("protection", "step"),
    [(PAILLIER, step) for step in ("shares", "reply", "agree", "unmask")] + [(CKKS, "reply"), (CKKS, "agree")],
)
def test_sites_that_drop_out_at_any_step(federation: Any, protection: Any, step: str) -> None:
    tables = tables_of(federation, sites=5)
    plan = glm(federation, tables, protection, cohort={"min_sites": 3})
    outcome = federation.run(plan, tables, wrap=gone_at(step, ("s1", "s3")))["result"]
    assert outcome["rows"] == 120
    assert np.allclose(outcome["model"].weights, weights(federation, tables, ("s0", "s2", "s4")), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("protection", "step"), [(PAILLIER, "key"), (PAILLIER, "agree"), (CKKS, "key")])
def test_another_site_becomes_the_key_holder(federation: Any, protection: Any, step: str) -> None:
    tables = tables_of(federation)
    plan = glm(federation, tables, protection, cohort={"min_sites": 3})
    outcome = federation.run(plan, tables, wrap=gone_at(step, ("s0",)))["result"]
    assert outcome["rows"] == 120
    assert {body["site"] for body in keys(federation)} == {"s0", "s1"}
    assert np.allclose(outcome["model"].weights, weights(federation, tables, ("s1", "s2", "s3")), rtol=0, atol=1e-6)


def keys(federation: Any) -> list[dict[str, Any]]:
    return [body for body in federation.releases() if body["step"] == "key"]


@pytest.mark.parametrize(
    ("protection", "step", "named"),
    [(PAILLIER, "key", True), (PAILLIER, "reply", False), (PAILLIER, "decrypt", False), (CKKS, "reply", False),
     (CKKS, "agree", True), (CKKS, "decrypt", False)],
)  # fmt: skip
def test_a_key_holder_that_is_gone_ends_the_round(federation: Any, protection: Any, step: str, named: bool) -> None:
    tables = tables_of(federation)
    chosen = {**protection, "key_holder": "s2"} if named else protection
    plan = glm(federation, tables, chosen, cohort={"min_sites": 2})
    failure = run_fails(federation, plan, tables, wrap=gone_at(step, ("s2" if named else "s0",)))
    assert (type(failure), failure.code) == (TransportError, "he.key-holder-gone")


@BOTH
def test_the_key_outlives_the_key_holders_process(federation: Any, protection: Any) -> None:
    tables = tables_of(federation)
    begun: list[str] = []

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            if name == "s0" and message.meta.get("step") == "decrypt":
                old = federation.sites["s0"]
                begun.append(name)
                anew = Site(old._identity, old._journal, old._policy, old._data, old._coordinator)
                return anew.handle(message, progress)
            return endpoint(message, progress)

        return handle

    hidden = federation.run(glm(federation, tables, protection), tables, wrap=wrap)["result"]
    assert len(keys(federation)) == len(begun) > 1
    assert len({body["digest"] for body in keys(federation)}) == 1, "one key in all rounds"
    assert np.allclose(hidden["model"].weights, weights(federation, tables, tuple(tables)), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- parties that do not keep the protocol


@BOTH
@pytest.mark.parametrize("what", ["public key", "key signature", "key holder"])
def test_a_coordinators_own_key_is_refused(federation: Any, protection: Any, what: str) -> None:
    def change(arrays: dict[str, Any], message: Message) -> None:
        array = arrays[OWN + what]
        if array.shape:
            array[len(array) // 2] ^= 1
        else:
            array[...] = 1

    tables = tables_of(federation)
    wrap = changed_at("reply", "s3", change)
    failure = run_fails(federation, glm(federation, tables, protection), tables, wrap=wrap)
    assert (type(failure), failure.code) == (IntegrityError, "he.key-signature")
    failure = run_fails(federation, glm(federation, tables, {**protection, "key_holder": "s0"}), tables, wrap=wrap)
    assert failure.code == ("he.not-key-holder" if what == "key holder" else "he.key-signature")


def test_a_short_key_is_refused_though_it_is_signed(federation: Any) -> None:
    short = PrivateKey.generate(2048).public.to_bytes()

    def change(arrays: dict[str, Any], message: Message) -> None:
        announced = federation.journals["s0"].run(message.meta["run"])[1]
        about = claim(
            "paillier", message.meta["run"], agreement(announced["hash"], announced["roster_hash"]), "s0", short
        )
        arrays[OWN + "public key"] = np.frombuffer(short, np.uint8)
        arrays[OWN + "key signature"] = np.frombuffer(federation.sites["s0"]._identity.sign(about), np.uint8)

    tables = tables_of(federation, sites=3)
    plan = glm(federation, tables, {"sum": "paillier", "key_bits": 2064})
    failure = run_fails(federation, plan, tables, wrap=changed_at("reply", "s2", change))
    assert (type(failure), failure.code) == (ProtocolError, "he.key-size")


@BOTH
def test_a_sum_is_decrypted_once(federation: Any, protection: Any) -> None:
    answers: list[Message] = []

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            answer = endpoint(message, progress)
            if message.meta.get("step") == "decrypt":
                again = {key: np.zeros_like(value) for key, value in message.arrays.items()}
                answers.append(endpoint(Message(message.kind, message.meta, again), progress))
                another = {**message.meta, "step": "decrypt", "attempt": message.meta["attempt"] + 1}
                answers.append(endpoint(Message(message.kind, another, message.arrays), progress))
            return answer

        return handle

    tables = tables_of(federation, sites=3)
    federation.run(glm(federation, tables, protection), tables, wrap=wrap)
    codes = [answer.meta.get("code") for answer in answers]
    assert codes[::2] == ["task.changed"] * len(codes[::2])
    assert set(codes[1::2]) <= {"he.order", "secagg.order"}


def test_a_site_without_the_key_decrypts_nothing(federation: Any) -> None:
    answers: list[Message] = []

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            if name == "s1" and message.meta.get("step") == "agree":
                meta = {**message.meta, "step": "decrypt"}
                answers.append(endpoint(Message(message.kind, meta, message.arrays), progress))
            return endpoint(message, progress)

        return handle

    tables = tables_of(federation, sites=3)
    federation.run(glm(federation, tables, PAILLIER), tables, wrap=wrap)
    assert {answer.meta["code"] for answer in answers} == {"he.not-key-holder"}


def test_ckks_sums_are_decrypted_only_for_enough_signed_survivors(
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fewer(arrays: dict[str, Any], message: Message) -> None:
        arrays[OWN + "signatures of"][:2] = 0

    def other(arrays: dict[str, Any], message: Message) -> None:
        arrays[OWN + "survivors"][3] = 0

    tables = tables_of(federation)
    plan = glm(federation, tables, CKKS, cohort={"min_sites": 3})
    failure = run_fails(federation, plan, tables, wrap=changed_at("decrypt", "s0", fewer))
    assert failure.code == "he.key-holder-gone"
    assert "2 sites are left, and 3 are needed" in caplog.text
    failure = run_fails(federation, plan, tables, wrap=changed_at("agree", "s0", other))
    assert failure.code == "secagg.signature"


def test_what_the_key_holder_decrypts_is_under_masks(federation: Any) -> None:
    tables = tables_of(federation, sites=3)
    federation.run(glm(federation, tables, PAILLIER), tables)
    seen = 0
    for _, way, data in federation.wire:
        message = decode(data)
        if way == "from" and "cells" in message.arrays and message.arrays["cells"].shape[1] == 256:
            cells = [int.from_bytes(row.tobytes(), "little") for row in message.arrays["cells"]]
            assert max(cell.bit_length() for cell in cells) > 2000
            seen += 1
    assert seen > 1


# ---------------------------------------------------------------- plans that cannot be


@BOTH
def test_a_key_holder_that_is_no_site(federation: Any, protection: Any) -> None:
    tables = tables_of(federation, sites=3)
    failure = run_fails(federation, glm(federation, tables, {**protection, "key_holder": "s7"}), tables)
    assert (type(failure), failure.code) == (PlanError, "he.no-such-site")


def test_ckks_without_the_extra(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_of(federation)
    plan = glm(federation, tables, CKKS)
    check_plan(plan)
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert [(part.code, part.remedy) for part in caught.value.parts or [caught.value]] == [
        ("ckks.missing", "pip install 'atoll[he]'")
    ]


@pytest.mark.parametrize("name", ["paillier", "ckks"])
def test_estimates(name: str) -> None:
    short, long = {"x": real(10, bound=1, step=1e-6)}, {"x": real(100_000, bound=1, step=1e-6)}
    few, many = (protection_of(name).estimate(fields, 4, Choice(sum=name)) for fields in (short, long))
    assert 0 < few.seconds < many.seconds
    assert few.bytes < many.bytes
    assert many.bytes > 100_000


# ---------------------------------------------------------------- packing

FIELDS = st.lists(
    st.one_of(
        st.builds(lambda size, bound: count(size, bound=bound), st.integers(1, 70), st.integers(0, 2**50)),
        st.builds(
            lambda size, bound, bits, kind: Field(kind, (size,), bound, bound * 2.0**-bits),
            st.integers(1, 70), st.floats(1e-3, 1e9), st.integers(0, 44), st.sampled_from(["<f4", "<f8"]),
        ),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def drawn(fields: Mapping[str, Field], seed: int) -> dict[str, Any]:
    """Values within their bounds, many of them at the ends."""
    random, made = np.random.default_rng(seed), {}
    for name, field in fields.items():
        share = random.choice([-1, 1, 0, random.uniform(-1, 1)], math.prod(n or 0 for n in field.shape))
        if field.dtype == "<i8":
            made[name] = (share * float(field.bound or 0)).astype("<i8")
        else:
            made[name] = (share * (field.bound or 0)).astype(field.dtype)
    return made


@given(FIELDS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_sums_of_cells_are_sums(listed: list[Field], replying: int, absent: int, seed: int) -> None:
    fields = {f"f{i}": field for i, field in enumerate(listed)}
    slots = Slots(fields, replying + absent, 512)
    replies = [drawn(fields, seed + i) for i in range(replying)]
    packed = [slots.pack(reply) for reply in replies]
    sums = slots.sums([sum(column) for column in zip(*packed, strict=True)], replying)
    for name, field in fields.items():
        exact = sum(reply[name].astype(np.longdouble) for reply in replies)
        most = 0 if field.dtype == "<i8" else replying * (field.step or 0) / 2 + 1e-15 * replying * (field.bound or 0)
        assert sums[name].shape == field.shape
        assert (np.abs(sums[name] - exact) <= most * 1.01).all()


def test_what_is_no_sum_of_cells_is_refused() -> None:
    slots = Slots({"n": count(3, bound=1000), "x": real(5, bound=10, step=1e-6)}, 3, 512)
    cells = slots.pack({"n": np.arange(3), "x": np.arange(5.0)})
    assert len(cells) == 1
    for wrong in ([cells[0] | 1 << 400], [*cells, 0], []):
        with pytest.raises(ProtocolError, match="not a sum"):
            slots.sums(wrong, 1)


@given(FIELDS, st.integers(1, 200), st.integers(0, 99))
def test_sums_of_limbs_are_sums(listed: list[Field], num_sites: int, seed: int) -> None:
    fields = {f"f{i}": field for i, field in enumerate(listed)}
    try:
        limbs = Limbs(fields, num_sites)
    except PlanError as error:
        assert error.code == "ckks.counts"
        return
    replying, random = min(num_sites, 5), np.random.default_rng(seed)
    replies = [drawn(fields, seed + i) for i in range(replying)]
    total = np.sum([limbs.split(reply) for reply in replies], axis=0)
    noise = random.choice([-1, 1], limbs.num_values) * error_bound(1.0, replying)
    sums = limbs.sums(total + noise, replying)
    for name, field in fields.items():
        exact = sum(reply[name].astype(np.longdouble) for reply in replies)
        most = 0 if field.dtype == "<i8" else replying * (field.step or 0) / 2 + 1e-15 * replying * (field.bound or 0)
        assert (np.abs(sums[name] - exact) <= most * 1.01).all()


def test_counts_beyond_what_ckks_tells_exactly() -> None:
    with pytest.raises(PlanError, match="not exact"):
        Limbs({"n": count(bound=2**52)}, 3)
    with pytest.raises(PlanError, match="1025 sites"):
        Limbs({"n": count(bound=2)}, 1025)
