"""Many simulated sites' local steps taken at once, in one process: the same algorithms, unchanged.

A handler's :meth:`atoll.horizontal.local.Local.sgd` is where a site's time goes. Here each site's handler is run until
it asks for such steps; then the steps of all sites that ask are taken together (``models/batched.py``), and each
handler is run anew and given what came of them, until it has its reply. A handler is a function of what it is sent, of
its rows and its state, so that running it twice changes nothing. Every site has its own mini-batches, in the order of
its own shuffler; they are padded to one size, and sites with fewer steps stop earlier. What comes out equals each site
computed alone to rounding.

A handler that never asks, or whose model cannot be learned at many sites at once, is simply run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.mail import Mail
from atoll.contract.program import Handler, Program, SiteView, handler_of
from atoll.contract.rounds import Reply, Task
from atoll.contract.wire import Array
from atoll.horizontal.local import Asked, Kept, LocalParams, Trained, diverged
from atoll.models.batched import Learn
from atoll.models.batched import batched as learned_at_once
from atoll.models.model import Examples, Model

Answer = Reply | AtollError
WAITING_BYTES = 1 << 29
"""Weights of sites that wait for their steps at the same time, about."""
AT_ONCE_BYTES = 1 << 23
"""Weights, gradients and rows of the sites in one step: they stay near the cache."""
AHEAD_BYTES = 1 << 26
"""Rows that are laid out before they are learned from."""


def batched(program: Program, name: str) -> Callable[[Sequence[SiteView], Sequence[Task]], list[Answer]] | None:
    """The answers of many sites to handler *name* of *program*, in their order: what the handler gives, or the error
    that it raises at that site. None where the program's sites take no steps."""
    if not isinstance(program.params, LocalParams) or not isinstance(getattr(program, "_kept", None), Kept):
        return None
    return _Crowd(program, handler_of(program, name))


class _Paused(Exception):
    """A handler asks for steps."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


class _Seat:
    """One site's view, as its handler sees it in one run: state and personal model are copies until the last."""

    def __init__(self, view: SiteView, crowd: _Crowd) -> None:
        self.view, self.crowd, self.done = view, crowd, list[Trained | AtollError]()
        self.name, self.table, self.holdout = view.name, view.table, view.holdout
        self.min_group_size, self.progress, self.shares = view.min_group_size, view.progress, view.shares

    @property
    def mail(self) -> Mail:
        return self.view.mail

    def begin(self) -> None:
        """Another run of the handler."""
        self.state, self.given = dict(self.view.state), iter(self.done)
        self.__dict__.pop("personal", None)

    @cached_property
    def personal(self) -> dict[str, Array]:
        return dict(self.view.personal)

    def end(self) -> None:
        """The handler came to its end: what it changed holds."""
        _replace(self.view.state, self.state)
        if "personal" in self.__dict__:
            _replace(self.view.personal, self.personal)

    def joint(self, asked: Asked) -> Trained | None:
        """Called by ``Local.sgd``: the steps' outcome, when it is there; None: let it take them itself."""
        if not asked.steps or self.crowd.learn(asked) is None:
            return None
        found = next(self.given, None)
        if found is None:
            raise _Paused(asked)
        if isinstance(found, AtollError):
            raise found
        return found


def _replace(held: dict[str, Array], new: Mapping[str, Array]) -> None:
    for name in held.keys() - new.keys():
        del held[name]
    held.update(new)


class _Crowd:
    """See :func:`batched`."""

    def __init__(self, program: Program, handler: Handler) -> None:
        self.program, self.handler = program, handler
        self._learn: tuple[Model, Learn | None] | None = None

    def learn(self, asked: Asked) -> Learn | None:
        """How the model that is asked about is learned at many sites at once."""
        model = asked.at.model
        if self._learn is None or self._learn[0] is not model:
            self._learn = (model, learned_at_once(model, asked.at.examples.take(slice(2))))
        return self._learn[1]

    def __call__(self, views: Sequence[SiteView], tasks: Sequence[Task]) -> list[Answer]:
        found: list[Answer | None] = [None] * len(views)
        seats = [_Seat(view, self) for view in views]
        waiting: dict[int, Asked] = {}
        held = 0
        for place, task in enumerate(tasks):
            answer = self._run(seats[place], task)
            if isinstance(answer, _Paused):
                waiting[place] = answer.asked
                held += 2 * answer.asked.at.model.weights.nbytes
            else:
                found[place] = answer
            if waiting and (held > WAITING_BYTES or place + 1 == len(tasks)):
                self._finish(seats, tasks, waiting, found)
                waiting, held = {}, 0
        return cast(list[Answer], found)

    def _finish(
        self, seats: Sequence[_Seat], tasks: Sequence[Task], waiting: dict[int, Asked], found: list[Answer | None]
    ) -> None:
        """Take the steps of all that wait, until they ask for no more."""
        while waiting:
            outcomes = self._together(list(waiting.values()))
            again: dict[int, Asked] = {}
            for place, outcome in zip(waiting, outcomes, strict=True):
                seats[place].done.append(outcome)
                answer = self._run(seats[place], tasks[place])
                if isinstance(answer, _Paused):
                    again[place] = answer.asked
                else:
                    found[place] = answer
            waiting = again

    def _run(self, seat: _Seat, task: Task) -> Answer | _Paused:
        seat.begin()
        try:
            reply = self.handler.answer(self.program, cast(SiteView, seat), task)
        except _Paused as paused:
            return paused
        except AtollError as error:
            return error
        seat.end()
        return reply

    def _together(self, asked: Sequence[Asked]) -> list[Trained | AtollError]:
        """The outcomes of steps, in order."""
        found: list[Trained | AtollError | None] = [None] * len(asked)
        alike: dict[Any, list[int]] = {}
        for place, one in enumerate(asked):
            p = one.at.params
            key = (id(one.at.model), p.batch_size, p.momentum, p.weight_decay, _still(one).tobytes())
            alike.setdefault(key, []).append(place)
        for places in alike.values():
            places.sort(key=lambda place: -asked[place].steps)
            model, p = asked[places[0]].at.model, asked[places[0]].at.params
            row = sum(array[:1].size for array in asked[places[0]].at.examples.inputs)
            each = (4 * len(model.weights) + 4 * p.batch_size * row) * model.dtype.itemsize
            most = max(1, AT_ONCE_BYTES // each)
            for start in range(0, len(places), most):
                some = places[start : start + most]
                learn = self.learn(asked[some[0]])
                if learn is not None:
                    for place, outcome in zip(some, steps([asked[i] for i in some], learn), strict=True):
                        found[place] = outcome
        return cast(list[Trained | AtollError], found)


def _still(asked: Asked) -> NDArray[np.bool_]:
    """Weights that no step changes, [num_weights] or, where there are none, [0]."""
    masks = [mask for mask in (asked.at.fixed, asked.fixed) if mask is not None]
    return np.logical_or.reduce(masks) if masks else np.empty(0, bool)


def steps(asked: Sequence[Asked], learn: Learn) -> list[Trained | ProtocolError]:
    """The outcomes of :meth:`atoll.horizontal.local.Local.sgd` at sites of one model and one kind of steps, ordered by
    how many steps they take, most first."""
    p, model, most = asked[0].at.params, asked[0].at.model, asked[0].steps
    weights = np.stack([np.asarray(one.start, model.dtype) for one in asked])
    rates = np.array([one.at.params.learning_rate for one in asked], model.dtype)[:, None]
    velocity = np.zeros_like(weights) if p.momentum else None
    decay, momentum = np.asarray(p.weight_decay, model.dtype), np.asarray(p.momentum, model.dtype)
    still, losses = _still(asked[0]), np.zeros((len(asked), most))
    bent = any(one.slope is not None for one in asked)
    for number, (there, batch, rows) in enumerate(_batches(asked)):
        moving = weights[:there]
        losses[:there, number], gradient = learn(moving, batch, rows)
        for place in range(there) if bent else ():
            slope = asked[place].slope
            if slope is not None:
                own = Examples(tuple(x[place, : rows[place]] for x in batch.inputs), batch.labels[place, : rows[place]])
                gradient[place] = slope(moving[place], own, gradient[place])
        if p.weight_decay:
            gradient = gradient + decay * moving
        if velocity is not None:
            velocity[:there] *= momentum
            velocity[:there] += gradient
            gradient = velocity[:there]
        step = rates[:there] * gradient
        if len(still):
            step[:, still] = 0
        moving -= step
    found: list[Trained | ProtocolError] = []
    sound = np.isfinite(weights).all(1)
    for place, one in enumerate(asked):
        loss = float(np.mean(losses[place, : one.steps]))
        fine = bool(sound[place]) and np.isfinite(loss)
        found.append(Trained(weights[place].copy(), one.steps, loss) if fine else diverged())
    return found


def _batches(asked: Sequence[Asked]) -> Iterator[tuple[int, Examples, NDArray[np.int64]]]:
    """Step by step: (how many sites still take part, their mini-batches padded with rows of their own, [sites,
    batch_size, …], rows in each of them, [sites])."""
    size, most = asked[0].at.params.batch_size, asked[0].steps
    wide = min(size, max(len(one.at.examples) for one in asked))
    order = np.zeros((len(asked), most, wide), np.int64)
    rows = np.zeros((len(asked), most), np.int64)
    for place, one in enumerate(asked):
        for number, drawn in enumerate(one.at.drawn(one.steps, one.part)):
            order[place, number, : len(drawn)], order[place, number, len(drawn) :] = drawn, drawn[0]
            rows[place, number] = len(drawn)
    taking = np.array([one.steps for one in asked])
    arrays = [(*one.at.examples.inputs, one.at.examples.labels) for one in asked]
    each = sum(array[:1].nbytes for array in arrays[0])
    window = max(1, min(most, AHEAD_BYTES // max(1, each * wide * len(asked))))
    for start in range(0, most, window):
        some = slice(start, start + window)
        there = int((taking > start).sum())
        laid = [
            np.stack([own[kind][order[place, some].ravel()] for place, own in enumerate(arrays[:there])])
            for kind in range(len(arrays[0]))
        ]
        laid = [array.reshape(there, -1, wide, *array.shape[2:]) for array in laid]
        for number in range(start, min(start + window, most)):
            going = int((taking > number).sum())
            *inputs, labels = [array[:going, number - start] for array in laid]
            yield going, Examples(tuple(inputs), labels), rows[:going, number]
