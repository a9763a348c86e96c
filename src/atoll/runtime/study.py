"""A study: preparation, the program itself, and evaluation, as one sans-IO program.

The recipe's statistics are fetched by ordinary statistics programs; what was fitted
travels with every later task as its *view*. A model that comes out is scored on every
site's held-out rows by the ordinary evaluation program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from atoll.aggregation.rule import Aggregation
from atoll.contract.capabilities import MEANING, Capabilities, conflicts
from atoll.contract.errors import AtollError, PlanError, PolicyError, refuse_all
from atoll.contract.plan import Plan
from atoll.contract.program import Cohort, Program, build, relay
from atoll.contract.protection import find
from atoll.contract.rounds import Arrival, Checkpoint, Gather, Gathered, Round, Steps, Sum, Summed, Together
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json, canonical_json
from atoll.data.recipe import Prepared
from atoll.data.step import Need
from atoll.statistics.evaluation import asked_of


def check_plan(plan: Plan) -> Program:
    """The plan's program, after everything that can be refused before data is read.

    Raises PlanError listing unknown names, parameters that do not fit the program, columns
    that are not in the prepared schema, and combinations that cannot work.
    """
    problems: list[AtollError] = []
    program = None
    try:
        program = build(plan.program, plan.params)
    except PlanError as error:
        problems.append(error)
    try:
        parts = [find(plan.protection.sum).capabilities] if plan.protection.sum else []
        if program is not None:
            if not parts:
                parts = [find(default_protection(program)).capabilities]
            if plan.privacy is not None:
                parts.append(NOISED)
            problems.extend(conflicts([program.capabilities, *parts]))
            problems.extend(_beyond_regions(plan, program))
    except PlanError as error:
        problems.append(error)
    try:
        schema = Prepared(plan.recipe).schema(plan.table)
        if program is not None:
            _check_columns(program, schema)
            _check_run(plan, program, schema)
    except PlanError as error:
        problems.append(error)
    refuse_all(PlanError, "plan.refused", problems)
    return build(plan.program, plan.params)


def default_protection(program: Program) -> str:
    """What a plan gets that names no protection: secagg, when all it asks for are sums; else PlanError."""
    if program.capabilities.needs <= {"sum", "ready"}:
        return "secagg"
    raise PlanError(
        "plan.no-protection", f"the plan names no protection, and {program.name} needs more than sums",
        field="protection", remedy="write protection: plain, if every site may show its own replies",
    )  # fmt: skip


def settled(plan: Plan) -> Plan:
    """*plan* with its protection written out. Raises PlanError."""
    if plan.protection.sum:
        return plan
    chosen = default_protection(build(plan.program, plan.params))
    return plan.model_copy(update={"protection": plan.protection.model_copy(update={"sum": chosen})})


def _beyond_regions(plan: Plan, program: Program) -> list[PlanError]:
    """What of a plan regions cannot answer: where several sites may stand behind a name, or a region asks its own."""
    if plan.cohort.members == 1 and not plan.cohort.above:
        return []
    return [
        PlanError(
            "region.reduction", f"{program.name} needs {MEANING[tag]}, and regions answer only with sums", field=tag,
            remedy="choose a program that needs only sums, or ask the sites themselves",
        )
        for tag in sorted(program.capabilities.needs - SUMMABLE)
    ]  # fmt: skip


def _check_columns(program: Program, schema: Any) -> None:
    """Start the generator and throw it away: its first round needs the schema, and no data."""
    steps = program.coordinate(Cohort(("check",), schema))
    next(steps, None)
    steps.close()


def _check_run(plan: Plan, program: Program, schema: TableSchema) -> None:
    """Raise PlanError where the run's settings and the program's do not fit each other."""
    by, drawn = plan.run.holdout_by, getattr(program.params, "sites_per_round", None)
    if unknown := sorted(plan.schedule.priority.keys() - set(plan.cohort.sites or plan.schedule.priority)):
        raise PlanError("plan.unknown-site", f"the cohort has no site {unknown[0]!r}", field="schedule.priority",
                        remedy="name a site of cohort.sites")  # fmt: skip
    chosen_above = bool(plan.cohort.above)  # a region asks all of its own sites
    if drawn is not None and drawn < plan.cohort.min_sites and not chosen_above:
        raise PlanError("plan.too-few-drawn", "a round would have fewer sites than the cohort's rule demands",
                        field="params.sites_per_round", remedy="raise it, or lower cohort.min_sites")  # fmt: skip
    least = min(plan.cohort.min_sites, len(plan.cohort.sites))
    if program.fewest(len(plan.cohort.sites)) < least and plan.cohort.sites and not chosen_above:
        raise PlanError("plan.too-few-drawn", "a sum would be of fewer sites than the cohort's rule demands",
                        field="params", remedy="make groups and buffers larger, or lower cohort.min_sites")  # fmt: skip
    _check_partial(plan, program, schema)
    if not chosen_above:
        _check_end(plan, program, schema)
    _check_aggregate(plan, program, plan.cohort.sites)
    if getattr(program.params, "evaluate_every", None) and not (plan.run.evaluate and plan.run.holdout):
        raise PlanError("plan.no-holdout", "there are no rows to evaluate on during the run",
                        field="params.evaluate_every", remedy="set run.holdout, or leave it out")  # fmt: skip
    if by is None:
        return
    column = schema.columns.get(by)
    if column is None or column.role == "ignore" or not (column.numeric or column.dtype in ("date", "datetime")):
        raise PlanError("plan.bad-column", f"{by!r} has no order to hold rows out by", field="run.holdout_by",
                        remedy="name a column of the prepared table with dates, times or numbers")  # fmt: skip
    if plan.privacy is not None:
        raise PlanError("privacy.holdout", "under privacy a record must not move the border of what is held out",
                        field="run.holdout_by", remedy="leave it out: rows are then drawn each by itself")  # fmt: skip


def _check_partial(plan: Plan, program: Program, schema: TableSchema) -> None:
    """Raise PlanError where sums of some of the cohort, of sites at different work, or of what sites remember would
    undo what the plan's protection promises: rounds that never end leave sites with different memories."""
    sites = len(plan.cohort.sites) or 1_000_000
    some = program.fewest(sites) < sites or any(share < 1 for share in plan.schedule.priority.values())
    if plan.protection.key_holder and some:
        raise PlanError("plan.key-holder-away", "sums are of some of the cohort, and the key holder may not be of them",
                        field="protection.key_holder", remedy="leave it out: each sum finds one")  # fmt: skip
    uneven = (
        "ready" in program.capabilities.needs or plan.schedule.effort_min < 1 or getattr(program, "self_chosen", False)
    )
    own = getattr(program, "personal", False) and _evaluation(plan, program, schema) is not None
    uneven = uneven or own or getattr(program, "remembers", False)
    if plan.protection.adversary == "active" and plan.privacy is None and (some or uneven):
        raise PlanError(
            "plan.active-choice", "a coordinator that does not keep the protocol could choose cohorts, efforts, ages, "
            "or what sites remember such that sums tell of single sites", field="protection.adversary",
            remedy="ask the whole cohort in every round (no draws, groups, clusters, buffers, priorities or efforts), "
            "of nothing that sites keep between rounds (personal models, control variates, error feedback), "
            "or add privacy",
        )  # fmt: skip


def _check_end(plan: Plan, program: Program, schema: TableSchema) -> None:
    """Raise PlanError where a run of differential privacy could end early, and rounds that its noise was not chosen for
    would follow."""
    early = getattr(program.params, "stop", None)
    budgeted = plan.schedule.stop_after_s is not None or plan.schedule.stop_after_bytes is not None
    follows = _evaluation(plan, program, schema) is not None or getattr(program, "personal", False)
    if plan.privacy is not None and follows and (budgeted or getattr(early, "asked", False)):
        raise PlanError(
            "privacy.early-stop", "the noise is chosen for a known number of rounds, and others follow these",
            field="params.stop" if not budgeted else "schedule",
            remedy="set run.evaluate: false, or let the run go on to its end",
        )  # fmt: skip


def _check_aggregate(plan: Plan, program: Program, sites: tuple[str, ...]) -> None:
    """Raise PlanError where *sites* are too few for the rule that is to withstand some of them."""
    aggregate = getattr(program.params, "aggregate", None)
    if isinstance(aggregate, Aggregation):
        aggregate.check_cohort(sites, getattr(program.params, "sites_per_round", None), plan.cohort.min_sites)


def study(plan: Plan, sites: tuple[str, ...], start: Mapping[str, Array] | None = None) -> Steps:
    """Everything a run asks of the cohort, in order; returns {"result", "fitted", "preparation", "evaluation"}.

    start: the state of the program's last Checkpoint, which is then yielded first, in
    place of the rounds before it.
    """
    program, prepared, exact = check_plan(plan), Prepared(plan.recipe), plan.privacy is None
    _check_aggregate(plan, program, sites)
    schema = plan.table
    view: dict[str, Json] = {}
    for stage in prepared.stages():
        before = prepared.before(stage, schema)
        cohort = Cohort(sites, before, plan.run.seed, plan.run.min_group_size, exact)
        results: dict[Need, Mapping[str, Any]] = {}
        for need in prepared.needs(stage):
            results[need] = yield from _staged(_asked(need).coordinate(cohort), "prepare", view, before)
        view |= prepared.fit(stage, results)
        schema = prepared.schema(schema, stage)
    cohort = Cohort(sites, schema, plan.run.seed, plan.run.min_group_size, exact)
    outcome: dict[str, Any] = {"fitted": view, "evaluation": None, "preparation": None}
    counting = _preparation(prepared)
    if counting is not None:
        outcome["preparation"] = yield from _staged(counting.coordinate(cohort), "prepare", view, schema)
    if start is not None:
        yield Checkpoint(start)
    outcome["result"] = result = yield from _staged(program.coordinate(cohort, start), "program", view, schema)
    evaluation = _evaluation(plan, program, schema)
    if evaluation is not None:
        scored = result.get("model") or program.model(schema)  # type: ignore[attr-defined]
        steps = evaluation.coordinate(cohort, {"weights": scored.weights})
        outcome["evaluation"] = yield from _staged(steps, "evaluate", view, schema)
    return outcome


def _asked(need: Need) -> Program:
    """The program that a step's statistics come from."""
    return build(need.program, {"columns": list(need.columns), **dict(need.options)})


def _preparation(prepared: Prepared) -> Program | None:
    """The program that counts what preparation left out, if it may leave out rows."""
    reasons = prepared.drops()
    asked = {"reasons": list(reasons), "anonymity": prepared.anonymises}
    return build("statistics.preparation", asked) if reasons else None


def _evaluation(plan: Plan, program: Program, schema: TableSchema) -> Program | None:
    """The program that scores what *program* fits, if it fits a model and rows are held out."""
    model = getattr(program, "model", None)
    if model is None or not plan.run.evaluate or plan.run.holdout == 0:
        return None
    shared, personal = getattr(program, "shared", True), getattr(program, "personal", False)
    return asked_of(model(schema), exact=plan.privacy is None, personal=personal or not shared, shared=shared)


def _said(program: Program) -> tuple[str, bytes]:
    return program.name, canonical_json(program.params.model_dump(mode="json"))


def _led_to(program: Program, schema: TableSchema) -> set[tuple[str, bytes]]:
    """The programs, with their parameters, whose rounds *program* comes to ask: found by running it on sums of zero.

    What it calls must not depend on the data; else sites refuse it, and say so.
    """
    found: set[tuple[str, bytes]] = set()
    steps, value = program.coordinate(Cohort(("a", "b", "c"), schema)), None
    with np.errstate(all="ignore"), contextlib.suppress(StopIteration, AtollError, *UNDEFINED):
        for _ in range(DRY_ROUNDS):
            item: Any = steps.send(value)
            value = None
            if isinstance(item, Round | Together):
                these = item.rounds if isinstance(item, Together) else (item,)
                found |= {(one.program, canonical_json(one.params)) for one in these}
                nothing = tuple(map(_nothing, these))
                value = nothing if isinstance(item, Together) else nothing[0]
    steps.close()
    return found


def _nothing(asked: Round) -> Summed | Gathered | Arrival:
    """What a round comes to when nobody has anything."""
    zeros = {n: np.zeros([size or 0 for size in f.shape], f.dtype) for n, f in asked.reply.items()}
    if isinstance(asked.reduce, Sum):
        return Summed(zeros, ("a", "b", "c"))
    return Gathered({}) if isinstance(asked.reduce, Gather) else Arrival("a", 0, zeros)


SUMMABLE = frozenset({"sum", "bounded", "resolution", "bounded-weight"})
"""What a program may need where regions answer."""
NOISED = Capabilities("privacy (noised sums)", needs=frozenset({"bounded", "resolution"}), offers=frozenset())
DRY_ROUNDS = 64
UNDEFINED = (ArithmeticError, ValueError, IndexError)
"""What a program may come to when there is nobody at all."""


class Permitted:
    """What a site that approved *plan* answers: the plan's own program, the programs that it comes to call,
    and what preparation and evaluation ask; each with the parameters the plan gives it."""

    def __init__(self, plan: Plan) -> None:
        program, prepared = check_plan(plan), Prepared(plan.recipe)
        schema = prepared.schema(plan.table)
        asked: list[Program | None] = [
            program,
            *program.parts,
            _evaluation(plan, program, schema),
            _preparation(prepared),
        ]
        asked += [_asked(need) for stage in prepared.stages() for need in prepared.needs(stage)]
        self._asked = {_said(one) for one in asked if one is not None}
        for one in asked:
            if one is not None and one.calls:
                self._asked |= _led_to(one, schema)

    def check(self, program: Program) -> None:
        """Raise PolicyError unless the plan leads to *program* with its parameters."""
        if _said(program) not in self._asked:
            raise PolicyError(
                "policy.not-in-plan",
                f"{program.name} with these parameters is not part of the approved plan",
                field=program.name,
                remedy="submit a plan that asks for it, and have it approved",
            )


def _staged(steps: Steps, stage: str, view: Mapping[str, Json], schema: TableSchema) -> Steps:
    frozen = dict(view)

    def stamp(asked: Round) -> Round:
        return replace(asked, stage=stage, view=frozen, schema=schema)

    result = yield from relay(steps, stamp)
    return result
