"""What programs ask for and are answered with: task names, what a task carries, results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Gathered, Summed, Task, TaskId


def test_a_task_name_is_unambiguous_and_survives_the_journey() -> None:
    task = TaskId("ab" * 16, 3, 1, "reply", "north")
    assert str(task) == f"{'ab' * 16}/3/1/reply/north"
    assert TaskId.from_json({**task.to_json(), "more": 1}) == task


@pytest.mark.parametrize("name", ["run", "round", "attempt", "step", "site"])
@pytest.mark.parametrize("value", [None, [], {}, 1.5])
def test_a_malformed_task_name_is_refused(name: str, value: Any) -> None:
    whole = TaskId("r", 3, 1, "reply", "north").to_json()
    for meta in ({**whole, name: value}, {k: v for k, v in whole.items() if k != name}):
        with pytest.raises(ProtocolError):
            TaskId.from_json(meta)


def test_shuffling_is_a_function_of_the_seed_alone() -> None:
    def order(*seed: int) -> list[int]:
        return Task(TaskId("r", 0, 0, "reply", "s"), {}, seed).shuffler().permutation(20).tolist()

    assert order(1, 2, 3) == order(1, 2, 3)
    assert len({tuple(order(1, 2, n)) for n in range(50)}) == 50
    # the very bits: a run repeated with another version of Atoll shuffles alike
    assert np.random.Generator(np.random.Philox(np.random.SeedSequence((7,)))).permutation(20).tolist() == order(7)


def test_results_are_mappings() -> None:
    total = Summed({"x": np.ones(2)}, ("a", "b"))
    assert list(total) == ["x"] and len(total) == 1 and total["x"].sum() == 2 and "y" not in total
    gathered = Gathered({"b": {"x": np.zeros(1)}, "a": {"x": np.ones(1)}})
    assert gathered.sites == ("b", "a") and list(gathered) == ["b", "a"] and len(gathered) == 2
    assert gathered["a"]["x"] == 1
    task = Task(TaskId("r", 0, 0, "reply", "s"), {"w": np.ones(3)}, (0,))
    assert task.take("w", (3,)).sum() == 3


@pytest.mark.parametrize(
    "sent", [np.ones((1, 3)), np.ones((3, 1)), np.ones(2), np.ones(3, "<i8"), np.array([1, 2, np.nan])]
)
def test_a_handler_takes_exactly_what_it_names(sent: Any) -> None:
    task = Task(TaskId("r", 0, 0, "reply", "s"), {"w": sent}, (0,))
    for name in ("w", "v"):
        with pytest.raises(ProtocolError) as caught:
            task.take(name, (3,))
        assert caught.value.code == "task.array" and caught.value.field == name
