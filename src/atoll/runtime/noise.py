"""A run's differential privacy: how many releases a plan leads to, and by how much one unit changes each.

Everything here follows from the plan and from code that is installed at the site; nothing that the coordinator
says makes the noise smaller.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from atoll.contract.errors import AtollError, PlanError, SchemaError
from atoll.contract.plan import Plan
from atoll.contract.privacy import Privacy
from atoll.contract.program import Handler, Program, build, handler_of
from atoll.contract.protection import find
from atoll.contract.rounds import Arrival, Field, Gathered, Ready, Round, Stream, Sum, Summed, Together
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms
from atoll.contract.wire import Array, Json, canonical_json, to_json
from atoll.data.recipe import Prepared
from atoll.data.table import Table
from atoll.privacy.dp.release import Noise
from atoll.runtime.study import UNDEFINED, study

DRY_ROUNDS = 20_000
NOBODY = 100
"""What every count is taken for when a study is run dry."""


def noise_of(plan: Plan, num_sites: int) -> Noise | None:
    """The noise that a plan of differential privacy asks for; None without. Raises PlanError and PrivacyBudgetError
    where its promise cannot be kept."""
    return None if plan.privacy is None else _noise(to_json(plan.to_json()), num_sites)


@lru_cache(maxsize=8)
def _noise(plan_json: bytes, num_sites: int) -> Noise:
    """Kept, as calibrating takes seconds."""
    plan = Plan.from_json(json.loads(plan_json))
    privacy = cast(Privacy, plan.privacy)
    rounds, ended = dry(plan, num_sites)
    if not ended:
        raise PlanError(
            "privacy.rounds", "how many sums the study needs cannot be told beforehand, so no noise can be chosen",
            field="program", remedy="choose a program with a fixed number of rounds, and recipe steps that fit nothing",
        )  # fmt: skip
    problems = [asked for asked in rounds if not isinstance(asked.reduce, Sum) and not silent(asked)]
    if problems:
        raise PlanError(
            "privacy.exact-replies", f"{problems[0].program} asks for single replies, which no shared noise protects",
            field="privacy", remedy="choose a program that needs only sums",
        )  # fmt: skip
    if privacy.unit != "site" and (ties := Prepared(plan.recipe).ties):
        raise PlanError(
            "privacy.tied-rows", f"step {ties[0]} makes one row of several, so that no noise hides one", field="recipe",
            remedy="leave the step out, prepare the table before, or choose the unit site",
        )  # fmt: skip
    single = privacy.unit == "record" or (privacy.unit == "entity" and privacy.rows_per_entity == 1)
    rates, once = [], []
    for number, asked in enumerate(rounds):
        if silent(asked):
            rates.append(0.0)
            continue
        made = build(asked.program, asked.params)
        _declared(plan, made, handler_of(made, asked.name), asked.name)
        # whoever has several rows is in more samples, and in more rounds
        rates.append(float(getattr(made, "sampling_rate", 1.0)) if single else 1.0)
        if single and asked.name in getattr(made, "once", ()):
            once.append(number)
    behind, least = plan.cohort.members, min(plan.cohort.min_sites, num_sites)
    shared = not find(plan.protection.sum).reveals and behind == 1  # a region is no site whose share one may count on
    if once and shared and least < num_sites:
        raise PlanError(
            "privacy.tree-dropouts", "shares of a tree of noise need the same sites in every round",
            field="cohort.min_sites", remedy=f"set cohort.min_sites to {num_sites} and on_dropout to fail",
        )  # fmt: skip
    planned = [asked_of(one.program, one.params, one.name, one.reply) for one in rounds]
    noise = Noise(privacy, rates, least, shared=shared, once=once, planned=planned, behind=behind)
    if rates:
        _ = noise.multipliers  # found now, so that a promise that cannot be kept is refused before data is read
    return noise


def asked_of(program: str, params: Json, name: str, fields: Mapping[str, Field]) -> str:
    """What a round asks, as far as its noise was chosen for it: handler, parameters, dtypes and shapes."""
    told = {field: [declared.dtype, list(declared.shape)] for field, declared in fields.items()}
    return hashlib.sha256(canonical_json([program, params, name, told])).hexdigest()


def norms_of(
    plan: Plan, program: Program, name: str, schema: TableSchema, fields: Mapping[str, Field], sent: Mapping[str, Any]
) -> dict[str, Norms]:
    """By how much one unit of the plan's privacy changes each of *fields* in the handler *name*'s reply.

    schema: of the table the handler sees. sent: the round's arrays. Raises PlanError where that is not bounded.
    """
    handler = handler_of(program, name)
    declared = _declared(plan, program, handler, name)
    arrays: dict[str, Array] = {key: np.asarray(value) for key, value in sent.items()}
    norms = dict(declared(program, schema, arrays)) if declared else _by_bounds(fields)
    norms |= {table.withheld: Norms(0, 0) for table in handler.cells}  # nothing is withheld where noise protects
    if missing := sorted(fields.keys() - norms.keys()):
        raise _unbounded(program, name, ", ".join(missing))
    if plan.privacy is not None and plan.privacy.unit == "entity":
        return {field: each * plan.privacy.rows_per_entity for field, each in norms.items()}
    return norms


def check_entities(plan: Plan, tables: Sequence[Table]) -> None:
    """Raise SchemaError when the plan's privacy is of entities, and the table has none, or one with too many rows."""
    if plan.privacy is None or plan.privacy.unit != "entity":
        return
    named = any(column.role == "entity" for column in plan.table.columns.values())
    ids = np.concatenate([table.ids for table in tables])
    most = int(np.unique(ids, return_counts=True)[1].max(initial=0))
    if not named or most > plan.privacy.rows_per_entity:
        raise SchemaError(
            "privacy.entity", "the table has no column of role entity" if not named else "an entity has too many rows",
            field="privacy.rows_per_entity", remedy="keep one row an entity in the recipe, or raise rows_per_entity",
        )  # fmt: skip


def with_room(noise: Noise, plan: Plan, asked: Round, number: int) -> dict[str, Field]:
    """A round's fields as they are with noise in them: what the coordinator expects of its sum."""
    program = build(asked.program, asked.params)
    norms = norms_of(plan, program, asked.name, asked.schema, asked.reply, asked.send)
    return noise.fitted(number, asked.reply, norms)[0]


def not_negative(arrays: Mapping[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
    """Noised sums, with counts that noise drove below zero at zero."""
    return {n: np.maximum(a, 0) if np.dtype(fields[n].dtype).kind in "iu" else a for n, a in arrays.items()}


def _declared(plan: Plan, program: Program, handler: Handler, name: str) -> Any:
    if plan.privacy is not None and plan.privacy.unit == "site":
        return handler.site
    if handler.record is None:
        raise _unbounded(program, name, name)
    return handler.record


def _unbounded(program: Program, name: str, field: str) -> PlanError:
    return PlanError(
        "privacy.unbounded", f"nothing bounds how much one unit changes {program.name}'s round {name!r}", field=field,
        remedy="choose another program (for training: horizontal.dpsgd), or the unit site",
    )  # fmt: skip


def _by_bounds(fields: Mapping[str, Field]) -> dict[str, Norms]:
    found = {}
    for name, field in fields.items():
        size = math.prod(int(n or 0) for n in field.shape)
        bound = math.inf if field.bound is None else field.bound
        found[name] = Norms(size * bound, math.sqrt(size) * bound)
    return found


def silent(asked: Round) -> bool:
    """Does nothing of the data leave a site in this round, but that it is ready?"""
    return isinstance(asked.reduce, Ready) and not asked.reply


def dry(plan: Plan, num_sites: int = 3) -> tuple[list[Round], bool]:
    """The rounds that a study asks of so many sites, found by running it on sums that tell nothing, to which sites are
    ready in the order in which they were asked; and whether it ended."""
    asked: list[Round] = []
    sites, flying = tuple(f"site-{place}" for place in range(num_sites)), list[str]()
    steps, value, ended = study(plan, sites), None, False
    with np.errstate(all="ignore"), contextlib.suppress(AtollError, *UNDEFINED):
        while len(asked) < DRY_ROUNDS:
            try:
                item: Any = steps.send(value)
            except StopIteration:
                ended = True
                break
            value = None
            if isinstance(item, Round | Together):
                these = item.rounds if isinstance(item, Together) else (item,)
                asked.extend(these)
                nothing = tuple(_nothing(one, sites if one.sites is None else one.sites, flying) for one in these)
                value = nothing if isinstance(item, Together) else nothing[0]
    steps.close()
    return asked, ended


def _nothing(asked: Round, sites: tuple[str, ...], flying: list[str]) -> Summed | Gathered | Arrival:
    if isinstance(asked.reduce, Ready | Stream):
        flying += sites
        zeros = {n: np.zeros([size or 0 for size in f.shape], f.dtype) for n, f in asked.reply.items()}
        return Arrival(flying.pop(0) if flying else "", 0, zeros)
    return Summed(telling_nothing(asked.reply), sites) if isinstance(asked.reduce, Sum) else Gathered({})


def telling_nothing(fields: Mapping[str, Field]) -> dict[str, Array]:
    """A sum of *fields* from which nothing follows: NOBODY of everything that is counted, and none of all else."""
    arrays: dict[str, Array] = {}
    for name, field in fields.items():
        whole = np.dtype(field.dtype).kind in "iu"
        some = NOBODY if field.dtype == "<i8" else 0
        arrays[name] = np.full([n or 0 for n in field.shape], some, "<i8" if whole else "<f8")
    return arrays
