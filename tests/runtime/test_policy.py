"""Policies: what a site allows, by default little, and all that is forbidden listed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from atoll.contract.errors import PlanError, PolicyError
from atoll.contract.plan import Plan
from atoll.runtime.home import POLICY_TEMPLATE
from atoll.runtime.policy import Policy


def plan(**changes: Any) -> Plan:
    whole = {
        "name": "s", "program": "horizontal.glm", "protection": "secagg", "purpose": "research",
        "schema": {"name": "t", "columns": {"a": {"range": [0, 1]}}},
    }  # fmt: skip
    return Plan.from_json({**whole, **changes})


def refused(check: Any) -> PolicyError:
    with pytest.raises(PolicyError) as error:
        check()
    return error.value


def test_the_defaults_allow_little() -> None:
    policy = Policy()
    policy.check_plan(plan(), 3)
    policy.check_program("horizontal.fedavg", "1")
    policy.check_program("statistics.describe", "7")
    assert (policy.min_group_size, policy.min_sites, policy.share) == (5, 3, ())
    assert policy.approval == policy.roster == "manual" and "plain" not in policy.protections


@pytest.mark.parametrize(
    ("changes", "num_sites", "code", "field"),
    [
        ({"purpose": "advertising"}, 3, "policy.purpose", "purposes"),
        ({"purpose": ""}, 3, "policy.purpose", "purposes"),
        ({"purpose": "research*"}, 3, "policy.purpose", "purposes"),
        ({"protection": "plain"}, 3, "policy.protection", "protections"),
        ({"protection": ""}, 3, "policy.protection", "protections"),
        ({"protection": "SecAgg"}, 3, "policy.protection", "protections"),
        ({}, 2, "policy.min-sites", "min_sites"),
        ({}, 0, "policy.min-sites", "min_sites"),
    ],
)
def test_what_a_plan_may_not_ask(changes: dict[str, Any], num_sites: int, code: str, field: str) -> None:
    error = refused(lambda: Policy().check_plan(plan(**changes), num_sites))
    assert (error.code, error.field) == (code, field)
    assert "policy.yaml" in error.remedy and repr(field) in error.remedy


def test_everything_forbidden_is_listed() -> None:
    error = refused(lambda: Policy().check_plan(plan(purpose="x", protection="plain"), 1))
    assert error.code == "policy.refused"
    assert [part.code for part in error.parts] == ["policy.purpose", "policy.protection", "policy.min-sites"]
    assert error.field == "purposes, protections, min_sites"


@pytest.mark.parametrize(
    ("patterns", "allowed", "forbidden"),
    [
        (["*"], ["a@1", "x.y@2"], []),
        ([], [], ["horizontal.glm@1"]),
        (["horizontal.*"], ["horizontal.glm@1", "horizontal.x.y@3"], ["horizontal@1", "Hor.g@1", "a.horizontal.b@1"]),
        (["horizontal.glm"], ["horizontal.glm@1", "horizontal.glm@2"], ["horizontal.glm2@1", "horizontal.gl@1"]),
        (["horizontal.glm@2"], ["horizontal.glm@2"], ["horizontal.glm@1", "horizontal.glm@21", "horizontal.glm2@2"]),
        (["horizontal.*@1"], ["horizontal.glm@1"], ["horizontal.glm@2", "vertical.glm@1"]),
        (["a.[bc]"], ["a.b@1"], ["a.d@1", "a.[bc]@1"]),
        (["a.b", "c.d@1"], ["a.b@9", "c.d@1"], ["c.d@2"]),
    ],
)  # fmt: skip
def test_programs_by_pattern_and_version(patterns: list[str], allowed: list[str], forbidden: list[str]) -> None:
    policy = Policy(programs=tuple(patterns))
    for name in allowed:
        policy.check_program(*name.split("@"))
    for name in forbidden:
        error = refused(lambda name=name: policy.check_program(*name.split("@")))
        assert (error.code, error.field) == ("policy.program", "programs") and name in str(error)


def test_a_sandbox_allows_everything() -> None:
    policy = Policy.sandbox()
    policy.check_plan(plan(purpose="anything", protection="plain"), 1)
    policy.check_program("my.own", "0.1")
    assert policy.approval == policy.roster == "automatic"
    assert set(policy.share) == {"rows", "metrics", "quality", "risk"}


# ---------------------------------------------------------------- files


def load(folder: Path, content: Any) -> Policy:
    path = folder / "policy.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Policy.load(path)


def test_the_template_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, POLICY_TEMPLATE) == Policy() == load(tmp_path, "{}")


def test_a_policy_survives_on_disk(tmp_path: Path) -> None:
    policy = Policy(programs=("a@1",), share=("metrics",), min_group_size=11, approval="automatic", modules=("x.y",))
    assert load(tmp_path, policy.model_dump(mode="json")) == policy


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"program": ["*"]}, "program"), ({"min_group_sise": 5}, "min_group_sise"),
        ({"min_group_size": 0}, "min_group_size"),
        ({"min_sites": 0}, "min_sites"), ({"min_sites": "few"}, "min_sites"), ({"share": ["everything"]}, "share.0"),
        ({"approval": "sometimes"}, "approval"), ({"approval": True}, "approval"),
        ({"max_message_bytes": -1}, "max_message_bytes"),
        ({"programs": "horizontal.*"}, "programs"), ({"protections": None}, "protections"),
    ],
)  # fmt: skip
def test_slips_in_a_policy_are_told(tmp_path: Path, content: dict[str, Any], field: str) -> None:
    with pytest.raises(PlanError) as error:
        load(tmp_path, content)
    assert error.value.field == field and str(error.value).startswith("policy: ")


def test_all_slips_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        load(tmp_path, {"min_group_sise": 5, "purpose": ["research"], "min_sites": -1})
    assert {part.field for part in error.value.parts} == {"min_group_sise", "purpose", "min_sites"}
    assert "did you mean 'min_group_size'?" in str(error.value) and "did you mean 'purposes'?" in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "a: [", "text"])
def test_a_file_that_is_no_policy_allows_nothing(tmp_path: Path, content: str) -> None:
    with pytest.raises(PlanError):
        load(tmp_path, content)
    with pytest.raises(PlanError):
        Policy.load(tmp_path / "nowhere.yaml")
