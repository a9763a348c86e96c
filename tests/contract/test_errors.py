"""The error tree: as documented, and safe to let out of a site."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract import errors
from atoll.contract.errors import AtollError, PlanError, PolicyError, ProtocolError, SchemaError, refuse_all
from atoll.contract.wire import parse_json, to_json

SECRET = "patient 4711 earns 93500"
KINDS = AtollError.__subclasses__()
TEXT = st.text(max_size=20).filter(str.isprintable)


def test_the_documented_tree_is_the_real_one() -> None:
    tree = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    defined = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, AtollError)]
    assert tree == [kind.__name__ for kind in KINDS] == [k.__name__ for k in defined if k is not AtollError]
    assert all(kind.__bases__ == (AtollError,) and kind.__doc__ for kind in KINDS)
    assert not any(kind.__subclasses__() for kind in KINDS)


def leaf(kind: type[AtollError], code: str, field: str, remedy: str) -> AtollError:
    return kind(code, SECRET, field=field, remedy=remedy, where={"site": SECRET})


def listed(kind: type[AtollError], code: str, parts: list[AtollError]) -> AtollError:
    with pytest.raises(AtollError) as error:
        refuse_all(kind, code, parts)
    return error.value


ERRORS = st.recursive(
    st.builds(leaf, st.sampled_from(KINDS), TEXT, TEXT, TEXT),
    lambda inner: st.builds(listed, st.sampled_from(KINDS), TEXT, st.lists(inner, min_size=2, max_size=4)),
    max_leaves=8,
)


def depth(error: AtollError) -> int:
    return 1 + max((depth(part) for part in error.parts), default=-1)


@given(ERRORS)
def test_what_leaves_never_contains_the_message(error: AtollError) -> None:
    record = error.public()
    assert SECRET not in to_json(record).decode()
    assert set(record) == {"error", "code", "field", "remedy", "parts"}


@given(ERRORS.filter(lambda error: depth(error) <= errors.MAX_DEPTH))
def test_an_error_survives_the_journey(error: AtollError) -> None:
    back = AtollError.from_public(parse_json(to_json(error.public())), site="north", round=3)
    assert back.public() == error.public()
    assert type(back) is type(error)
    assert back.where == {"site": "north", "round": 3}
    assert SECRET not in str(back)


def test_another_partys_text_cannot_steer_a_terminal() -> None:
    back = AtollError.from_public({"code": "a\x1b[2Jb", "remedy": "x\ny", "site": "s\r", "round": 0}, step="here")
    assert str(back).isprintable() and back.where == {
        "site": "s\N{REPLACEMENT CHARACTER}",
        "round": "0",
        "step": "here",
    }


def test_long_lists_are_cut() -> None:
    many = listed(PlanError, "plan.invalid", [PlanError(f"code.{n}", "text") for n in range(500)])
    assert len(many.parts) == 500
    assert len(many.public()["parts"]) == errors.MAX_PARTS
    assert len(AtollError.from_public({**many.public(), "parts": [{}] * 500}).parts) == errors.MAX_PARTS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=5
)
KEYS = st.sampled_from(["error", "code", "field", "remedy", "parts", "site", "round", "step", "trace"])


@settings(max_examples=300)
@given(st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON, max_size=4), max_size=3)))
def test_whatever_a_party_reports_becomes_an_error(record: dict[str, Any]) -> None:
    error = AtollError.from_public(record)
    assert isinstance(error, AtollError) and type(error) is not AtollError
    assert isinstance(str(error), str)
    to_json(error.public())


def test_a_report_nested_without_end_becomes_an_error() -> None:
    record: dict[str, Any] = {}
    for _ in range(5000):
        record = {"code": "x", "parts": [record]}
    error = AtollError.from_public(record)
    assert depth(error) <= errors.MAX_DEPTH and len(str(error)) < 10_000


def test_a_report_that_is_huge_stays_small() -> None:
    error = AtollError.from_public({"code": "x" * 10**6, "field": ["y"] * 10**5, "remedy": "z" * 10**6})
    assert max(len(error.code), len(error.field), len(error.remedy)) <= 500


def test_an_unknown_kind_is_a_protocol_error() -> None:
    for kind in ("AtollError", "KeyError", "SystemExit", "", None, 5):
        assert type(AtollError.from_public({"error": kind, "code": "c"})) is ProtocolError


def test_text_says_where_what_and_what_to_do() -> None:
    error = SchemaError("schema.missing-column", "a column is missing", field="age", remedy="add it")
    assert str(error) == "a column is missing (age) → add it"
    error.at(site="north", round=2, step=None).at(site="south", trace="abc")
    assert str(error) == "site north, round 2: a column is missing (age) → add it [trace abc]"
    assert str(SchemaError("code.only", "")) == "code.only"
    assert str(SchemaError("c", "column age is odd", field="age")) == "column age is odd"


def test_the_trace_is_told_once_however_deep_problems_are_listed() -> None:
    parts: list[AtollError] = [SchemaError("c", f"problem {i}").at(site=f"s{i}", trace="abc") for i in range(2)]
    with pytest.raises(SchemaError) as below:
        refuse_all(SchemaError, "plan.refused", parts)
    told = str(below.value.at(site="north", trace="abc"))
    assert told.count("[trace abc]") == 1 and told.endswith(" [trace abc]")
    assert told.startswith("site north: 2 problems:") and "site s0: problem 0" in told


def test_the_innermost_place_wins() -> None:
    error = ProtocolError("c", "m").at(site="north").at(site="coordinator", round=0)
    assert error.where == {"site": "north", "round": 0}
    assert str(error) == "site north, round 0: m"


def test_refuse_all() -> None:
    refuse_all(PlanError, "plan.invalid", [])
    single = PolicyError("policy.purpose", "no")
    with pytest.raises(PolicyError) as error:
        refuse_all(PlanError, "plan.invalid", [single])
    assert error.value is single
    both = listed(PlanError, "plan.invalid", [single, SchemaError("s", "column x is odd", field="x", remedy="mend x")])
    assert type(both) is PlanError and both.code == "plan.invalid" and both.field == "x"
    assert str(both) == "2 problems:\n    1. no\n    2. column x is odd → mend x"
    assert [type(part) for part in both.parts] == [PolicyError, SchemaError]
    nested = str(listed(PlanError, "outer", [both, single]))
    assert all(text in nested for text in ("2 problems", "1. no", "2. column x is odd"))


def test_places_are_told_in_one_order_whoever_adds_them() -> None:
    error = ProtocolError("a.b", "it broke").at(site="north").at(step="train", round=3)
    assert str(error) == "site north, round 3, step train: it broke"
