"""Programs: found by name, stamped with who answers each round, composed with ``yield from``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import REGISTRY, Cohort, ProgramParams, build, handler, handler_of, program, relay, summary
from atoll.contract.rounds import Checkpoint, Gather, Metrics, Round, Steps, Sum, count
from atoll.contract.schema import Column, TableSchema

COHORT = Cohort(("north", "south"), TableSchema(name="t", columns={"a": Column(range=(0, 1))}))


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """Programs registered by a test are forgotten after it."""
    known = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(known)


def make(name: str, width: int = 1, inner: Any = None, **declared: Any) -> Any:
    """A program asking two rounds, with what *inner* asks in between."""

    @program(name, **declared)
    class Made:
        """First line.

        More.
        """

        class Params(ProgramParams):
            width: int = 1

        def __init__(self, params: Any) -> None:
            self.params = params

        def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
            """Docs of coordinate."""
            first = yield Round("one", Sum(), {"n": count()})
            yield Metrics(0, {"first": float(first)})
            between = None
            if inner is not None:
                between = yield from build(inner, {"width": 7}).coordinate(cohort)
            yield Checkpoint({})
            last = yield Round("two", Gather(), {"n": count()})
            return name, first, between, last, start

        @handler("one")
        def answer_one(self, site: Any, task: Any) -> Any:
            """Answers."""
            return {"n": self.params.width}

        @handler("two", reduce="gather", groups=("n",))
        def answer_two(self, site: Any, task: Any) -> Any:
            """Answers."""
            return {"n": -self.params.width}

    return Made


def drive(steps: Steps) -> tuple[list[Any], Any]:
    """What is yielded, and what is returned; the n-th Round is sent n, everything else None."""
    yielded: list[Any] = []
    value = None
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            return yielded, stop.value
        yielded.append(item)
        rounds = sum(isinstance(y, Round) for y in yielded)
        value = rounds if isinstance(item, Round) else None


def test_rounds_are_stamped_with_their_program_and_parameters() -> None:
    make("test.plain")
    yielded, result = drive(build("test.plain", {"width": 3}).coordinate(COHORT))
    assert result == ("test.plain", 1, None, 2, None)
    assert [type(item) for item in yielded] == [Round, Metrics, Checkpoint, Round]
    assert [(r.name, r.program, r.params) for r in yielded if isinstance(r, Round)] == [
        ("one", "test.plain", {"width": 3}), ("two", "test.plain", {"width": 3}),
    ]  # fmt: skip
    assert yielded[1].values == {"first": 1.0}


def test_nested_programs_keep_their_own_stamp() -> None:
    make("test.innermost")
    make("test.middle", inner="test.innermost")
    make("test.outer", inner="test.middle")
    yielded, result = drive(build("test.outer", {"width": 3}).coordinate(COHORT))
    assert [(r.name, r.program.removeprefix("test."), r.params["width"]) for r in yielded if isinstance(r, Round)] == [
        ("one", "outer", 3), ("one", "middle", 7), ("one", "innermost", 7),
        ("two", "innermost", 7), ("two", "middle", 7), ("two", "outer", 3),
    ]  # fmt: skip
    middle = ("test.middle", 2, ("test.innermost", 3, None, 4, None), 5, None)
    assert result == ("test.outer", 1, middle, 6, None)


def test_a_program_can_start_from_a_state() -> None:
    make("test.plain")
    _, result = drive(build("test.plain", {}).coordinate(COHORT, start={"w": 5}))
    assert result[-1] == {"w": 5}


def test_relay_changes_rounds_only_and_passes_errors_on() -> None:
    def steps() -> Steps:
        got = yield Metrics(1, {})
        assert got is None
        got = yield Round("a", Sum(), {})
        raise ProtocolError("test.got", f"got {got}")

    relayed = relay(steps(), lambda asked: Round("b", asked.reduce, asked.reply))
    assert relayed.send(None) == Metrics(1, {})
    assert relayed.send(None) == Round("b", Sum(), {})
    with pytest.raises(ProtocolError, match="got 5"):
        relayed.send(5)


def test_two_programs_cannot_share_a_name() -> None:
    first = make("test.twice")

    class Other(first):  # type: ignore[misc]
        pass

    with pytest.raises(PlanError) as error:
        program("test.twice")(Other)
    assert (error.value.code, error.value.field) == ("program.duplicate", "test.twice")
    assert REGISTRY["test.twice"] is first
    again = make("test.twice")  # the same module loaded again: the newer one counts
    assert REGISTRY["test.twice"] is again


def test_what_is_declared_is_found() -> None:
    cls = make("test.declared", version="2.1", needs={"gather", "stream"}, offers={"bounded"})
    made = build("test.declared", {"width": 2})
    assert (made.name, made.version, made.params.width) == ("test.declared", "2.1", 2)
    assert made.capabilities.needs == {"gather", "stream"} and made.capabilities.offers == {"bounded"}
    assert make("test.default").capabilities.needs == {"sum"} and build("test.default", {}).version == "1"
    assert summary(cls) == "First line." and cls.coordinate.__doc__ == "Docs of coordinate."
    with pytest.raises(PlanError):
        make("test.odd", needs={"magic"})


def test_handlers_are_found_by_their_rounds_name() -> None:
    make("test.handlers")
    made = build("test.handlers", {"width": 4})
    one, two = handler_of(made, "one"), handler_of(made, "two")
    assert one.answer(made, None, None) == {"n": 4} and two.answer(made, None, None) == {"n": -4}  # type: ignore[arg-type]
    assert (one.reduce, one.groups, two.reduce, two.groups) == ("sum", frozenset(), "gather", frozenset({"n"}))
    for name in ("three", "answer_one", "coordinate", "__init__", ""):
        with pytest.raises(ProtocolError) as error:
            handler_of(made, name)
        assert error.value.code == "task.unknown-handler"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("test.know", "did you mean 'test.known'?"), ("tset.known", "did you mean 'test.known'?"), ("zzzz", "lists them")],
)
def test_an_unknown_program_suggests_the_nearest(name: str, remedy: str) -> None:
    make("test.known")
    with pytest.raises(PlanError) as error:
        build(name, {})
    assert (error.value.code, error.value.field) == ("program.unknown", "program") and remedy in error.value.remedy


def test_parameters_are_validated() -> None:
    make("test.known")
    with pytest.raises(PlanError) as error:
        build("test.known", {"widht": 1})
    assert (error.value.field, error.value.remedy) == ("widht", "did you mean 'width'?")
    with pytest.raises(PlanError) as error:
        build("test.known", {"width": "wide"})
    assert error.value.field == "width"
    with pytest.raises(ValueError, match="frozen"):
        build("test.known", {}).params.width = 5
