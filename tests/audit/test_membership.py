"""Membership inference tells members of an overfitted model, and not those of one that learnt nothing of them."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.audit.membership import Membership, lira, logits, loss_threshold, ridge
from atoll.contract.errors import PlanError


def table(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """200 rows of 300 features and labels at random: whatever a model knows of them, it memorised."""
    random = np.random.default_rng(seed)
    return random.normal(size=(200, 300)), random.integers(0, 2, 200).astype(float), np.arange(200) < 100


def test_an_overfitted_model_gives_its_members_away() -> None:
    x, y, member = table()
    train = ridge(0.1)
    predict = train(x[member], y[member])
    by_loss = loss_threshold(predict, x, y, member)
    by_ratio = lira(predict, train, x, y, member, num_shadows=64)
    assert by_loss.auc > 0.9
    assert by_ratio.auc > by_loss.auc
    assert by_ratio.tpr_at_1_fpr > 0.3


def test_lira_accuses_surely_where_the_loss_cannot() -> None:
    """Rows of unequal difficulty, at 1 % of false accusations: what the attack is for (Carlini et al. 2022)."""
    random = np.random.default_rng(1)
    x, y, member = random.normal(size=(300, 40)), random.integers(0, 2, 300).astype(float), np.arange(300) < 150
    x *= np.exp(random.normal(0, 1, 300))[:, None]
    train = ridge(0.1)
    predict = train(x[member], y[member])
    assert lira(predict, train, x, y, member).tpr_at_1_fpr > 2 * loss_threshold(predict, x, y, member).tpr_at_1_fpr


def test_a_model_of_other_rows_tells_nothing() -> None:
    x, y, member = table()
    others = table(9)
    train = ridge(0.1)
    predict = train(others[0], others[1])
    assert loss_threshold(predict, x, y, member).auc == pytest.approx(0.5, abs=0.1)
    assert lira(predict, train, x, y, member).auc == pytest.approx(0.5, abs=0.1)


def test_scores() -> None:
    member = np.array([True, True, False, False])
    assert Membership.of(np.array([4.0, 3.0, 2.0, 1.0]), member) == Membership(1.0, 1.0)
    assert Membership.of(np.array([1.0, 3.0, 2.0, 0.0]), member) == Membership(0.75, 0.5)
    assert logits(np.array([0.8, 0.8]), np.array([1.0, 0.0])) == pytest.approx([np.log(4), -np.log(4)])


def test_bad_input_is_refused() -> None:
    x, y, member = table()
    with pytest.raises(PlanError, match="members and others"):
        loss_threshold(ridge()(x, y), x, y, np.ones(200, bool))
    with pytest.raises(PlanError) as caught:
        lira(ridge()(x, y), ridge(), x, y, member, num_shadows=4)
    assert caught.value.code == "audit.few-shadows"
