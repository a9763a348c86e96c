"""The objective port: what boosting needs of a loss, and no more.

An objective is a *kind* with settings (``squared``, or ``{kind: quantile, alpha: 0.9}`` in a plan); its name is the
file in ``trees/objectives`` that holds it. Whatever leaves a site of it is a sum over rows of integers, declared as
:class:`Sums`: exact, in whatever order, and bounded for each row, so that every exact protection gives the sums that
the pooled rows have, and noise can hide a row.

    objective = make("logistic", "died", schema)
    g, h = objective.gradients(margin, objective.labels(table))     # integers: times objective.gradient.unit

Three rounds may be asked of an objective's own, and where it declares no sums for one (an empty mapping) there is none:

- *begin*, once: ``base(total)`` makes the base margins of it.
- *share*, before each tree: ``shared(total)`` makes one vector that every site is sent and :meth:`gradients` takes
  (what all rows at risk come to, of a proportional hazards model).
- *renew*, after each tree: ``renewed(total)`` makes its leaves' values, in place of −G / (H + λ), of sums by leaf.

*losses* ride on another round, for training and for held-out rows.

Source: Chen & Guestrin 2016, XGBoost (KDD), §2.2 (gradients and Hessians of any loss).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.rounds import Field, count
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.settings import validate
from atoll.contract.wire import Array, Json
from atoll.models.model import Goal, missing
from atoll.models.trees import Link

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_SITES = 1 << 14
"""Sums over so many sites fit an int64."""
MOST_BITS, LEAST_BITS = 32, 8


@dataclass(frozen=True, slots=True)
class Fixed:
    """Reals in [−bound, bound] as integers: a real is an integer times *unit*, a power of two."""

    bound: float
    unit: float

    @staticmethod
    def of(bound: float, schema: TableSchema) -> Fixed:
        """As fine as sums over all rows of MOST_SITES sites leave room for in 62 bits (24 bits of the bound with the
        default max_rows; never more than 32). Raises PlanError where max_rows leaves no room."""
        return Fixed(bound, _unit(bound, min(MOST_BITS, _room(schema))))

    def times(self, most: float, schema: TableSchema) -> Fixed:
        """Of reals *most* times as large; as fine as these where sums leave room, and whole numbers get fractions."""
        bound = self.bound * most
        finest = min(self.unit, Fixed.of(self.bound, schema).unit, Fixed.of(bound, schema).unit)
        return Fixed(bound, max(finest, _unit(bound, _room(schema))))

    @property
    def most(self) -> int:
        """The largest integer."""
        return round(self.bound / self.unit)

    def integers(self, values: Floats) -> Ints:
        """Rounded to the nearest, clipped to the bound; what is no number is 0."""
        clipped = np.clip(np.nan_to_num(values, nan=0.0), -self.bound, self.bound)
        return np.rint(clipped / self.unit).astype(np.int64)

    def reals(self, integers: Array) -> Floats:
        """Of integers, or sums of them."""
        return np.asarray(integers, np.float64) * self.unit


def _unit(bound: float, bits: int) -> float:
    return math.ldexp(1.0, math.frexp(bound)[1] - bits)


def _room(schema: TableSchema) -> int:
    """So many bits may a row have."""
    bits = 62 - schema.max_rows.bit_length() - (MOST_SITES - 1).bit_length()
    if bits < LEAST_BITS:
        raise PlanError(
            "trees.max-rows", "sums over so many rows do not fit 64 bits", field="max_rows",
            remedy="lower max_rows of the schema to what a site can really hold",
        )  # fmt: skip
    return bits


ONE = Fixed(1.0, 1.0)
"""Ones and zeros."""


@dataclass(frozen=True, slots=True)
class Sums:
    """One array of sums over rows: a row is in at most *cells* of its elements, in each by at most *fixed*."""

    shape: tuple[int, ...] = ()
    fixed: Fixed = ONE
    cells: int = 1

    def field(self, rows: int) -> Field:
        """Of a site with at most so many rows."""
        return count(self.shape, bound=rows * self.fixed.most)

    @property
    def norms(self) -> Norms:
        """What one row changes."""
        return touches(self.cells, self.fixed.most)


Declared = Mapping[str, Sums]
Summed = dict[str, Any]
"""Integers by the names declared."""
Each = Mapping[str, tuple[Ints | None, Ints]]
"""What each row adds, by the names declared: (the element that it is in, None of a single number; how much), [n]."""


class Settings(BaseModel):
    """Base of a kind's settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str


@dataclass(frozen=True)
class Objective:
    """Base of all kinds; *n* is the number of rows, *K* of outputs. A kind also has ``Settings`` and the class method
    ``of(settings, target, schema)``, which raises PlanError where the schema's columns do not suit it.

    target: the column that the model is of. gradient, hessian: how finely a row's are rounded, and their bounds.
    constant: every Hessian is one unit, so that their sums are the counts. telling: rows with unlike labels have unlike
    gradients somewhere, so that gradients which are all alike mean a constant label. evaluated: what the model predicts
    can be compared with the target. weighable: rows may have weights (see ``weighted.py``).
    """

    link: ClassVar[Link] = "identity"
    constant: ClassVar[bool] = False
    telling: ClassVar[bool] = True
    evaluated: ClassVar[bool] = True
    weighable: ClassVar[bool] = True

    target: str
    gradient: Fixed
    hessian: Fixed
    per_row: Fixed
    """Of one row's loss."""

    @property
    def outputs(self) -> int:
        """K."""
        return 1

    @property
    def max_step(self) -> float:
        """The largest |value| of a leaf, before the learning rate."""
        return math.inf

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns that it reads: no features by default."""
        return (self.target,)

    @property
    def exposed(self) -> str:
        """The column whose logarithm is added to every margin; "": none."""
        return ""

    # -- at the site

    def labels(self, table: TableView) -> Floats:
        """What the loss needs of all rows, [n] (cox: [n, 2]); raises SchemaError when one is missing."""
        return known(table, (self.target,))[:, 0]

    def counting(self, labels: Floats) -> NDArray[np.bool_] | None:
        """Rows that count at all, [n]; None: all."""
        return None

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """First and second derivative of every row's loss by its margin, [n, K] each, from *margin* [n, K]."""
        raise NotImplementedError

    # -- begin

    @property
    def begins(self) -> Declared:
        """Sums that the base margins are made of."""
        raise NotImplementedError

    def begin_each(self, labels: Floats) -> Each:
        """At the site: what each row adds to them."""
        raise NotImplementedError

    def begin_sums(self, labels: Floats) -> Summed:
        """At the site."""
        return added(self.begins, self.begin_each(labels))

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """Base margins, [K], finite whatever noise made of the sums. smallest: as of :meth:`renewed`."""
        raise NotImplementedError

    # -- loss

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """Every row's loss, [n]."""
        raise NotImplementedError

    @property
    def losses(self) -> Declared:
        """Sums that the mean loss is made of."""
        return {"rows": Sums(), "loss": Sums((), self.per_row)}

    def loss_sums(self, margin: Floats, labels: Floats) -> Summed:
        """At the site."""
        return {"rows": len(margin), "loss": self.per_row.integers(self.loss_of(margin, labels)).sum()}

    def loss(self, total: Mapping[str, Array]) -> float:
        """The mean loss; NaN of no rows."""
        rows = float(total["rows"])
        return float(self.per_row.reals(total["loss"])) / rows if rows > 0 else math.nan

    # -- share: before each tree

    @property
    def shares(self) -> Declared:
        """Sums over training rows that *shared* is made of."""
        return {}

    @property
    def shared_size(self) -> int:
        """Length of the vector that :meth:`gradients` takes."""
        return 0

    def share_sums(self, margin: Floats, labels: Floats) -> Summed:
        """At the site."""
        return {}

    def shared(self, total: Mapping[str, Array]) -> Floats:
        """[shared_size], finite."""
        return np.empty(0)

    # -- renew: after each tree

    def renews(self, leaves: int) -> Declared:
        """Sums over training rows, of shape [K, leaves, …]."""
        return {}

    def renew_sums(self, margin: Floats, labels: Floats, leaf: NDArray[np.int32], leaves: int) -> Summed:
        """At the site; leaf: of each row in each output's tree, [n, K], −1 for a row that is in none."""
        return {}

    def renewed(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """Leaves' values before the learning rate, [K, leaves], finite. smallest: the fewest rows that are told of:
        a leaf of fewer has the value 0, and none is among so many rows' least or greatest, less one."""
        raise NotImplementedError


KINDS: dict[str, type[Any]] = {}
C = TypeVar("C", bound=type[Any])


def objective(cls: C) -> C:
    """Register a class as the kind that its Settings' ``kind`` is by default."""
    KINDS[cls.Settings.model_fields["kind"].default] = cls
    return cls


def make(asked: str | Mapping[str, Json], target: str, schema: TableSchema) -> Objective:
    """The objective that a plan asks for, by its kind or with settings. Raises PlanError when there is none of that
    kind, a setting is wrong, or the target does not suit it. "auto": what suits the target."""
    if asked == "auto":
        kinds = {"binary": "logistic", "classes": "softmax"}
        asked = kinds.get(Goal.of(schema, (target,)).task, "squared")
    spec = {"kind": asked} if isinstance(asked, str) else dict(asked)
    kind = str(spec.get("kind", ""))
    name = f"{__package__}.objectives.{kind}"
    if kind not in KINDS and kind.isidentifier() and importlib.util.find_spec(name):
        importlib.import_module(name)
    if kind not in KINDS:
        raise PlanError("trees.objective", f"there is no objective {kind!r}", field="objective",
                        remedy="docs/plan.md lists the objectives")  # fmt: skip
    cls = KINDS[kind]
    made: Objective = cls.of(validate(cls.Settings, spec, "objective"), target, schema)
    return made


def fields(declared: Declared, schema: TableSchema) -> dict[str, Field]:
    """As a round declares them."""
    return {name: sums.field(schema.max_rows) for name, sums in declared.items()}


def added(declared: Declared, each: Each) -> Summed:
    """The sums over rows."""
    found: Summed = {}
    for name, (place, values) in each.items():
        if place is None:
            found[name] = values.sum()
        else:
            found[name] = np.zeros(declared[name].shape, np.int64)
            np.add.at(found[name].reshape(-1), place, values)
    return found


def norms(declared: Declared) -> dict[str, Norms]:
    """What one row changes of each."""
    return {name: sums.norms for name, sums in declared.items()}


def known(table: TableView, names: tuple[str, ...]) -> Floats:
    """Numeric columns [n, len(names)]; raises SchemaError where a cell is missing."""
    columns = np.column_stack([np.asarray(table[name], np.float64) for name in names])
    if gaps := [names[i] for i in np.flatnonzero(np.isnan(columns).any(axis=0))]:
        raise missing(gaps)
    return columns


def binary(schema: TableSchema, name: str) -> None:
    """Raise PlanError unless the column holds 0 and 1."""
    if Goal.of(schema, (name,)).task != "binary":
        raise PlanError("plan.bad-target", "the objective needs a target with values [0, 1]", field=name,
                        remedy="declare values: [0, 1], or choose another objective")  # fmt: skip
