"""What the coordinator sees: masked vectors are uniform and sum exactly; noise has the size it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

torch = pytest.importorskip("torch")

from atoll.audit.audit import Subject  # noqa: E402
from atoll.audit.network import batch_gradient  # noqa: E402
from atoll.audit.view import Protection, decode, encode, mask, observe  # noqa: E402
from atoll.contract.errors import PlanError  # noqa: E402


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(2, 5), st.integers(0, 2**32))
def test_masked_vectors_sum_to_the_plain_sum(values: list[float], sites: int, seed: int) -> None:
    vectors = {str(i): encode(np.array(values) * (i + 1)) for i in range(sites)}
    masked = mask(vectors, np.random.default_rng(seed))
    total = np.sum(list(masked.values()), axis=0, dtype=np.uint64)
    assert (total == np.sum(list(vectors.values()), axis=0, dtype=np.uint64)).all()
    wanted = np.array(values) * sum(range(1, sites + 1))
    assert decode(total) == pytest.approx(wanted, abs=sites * 2.0**-32, rel=1e-9)


def test_a_masked_vector_is_uniform_whatever_it_hides() -> None:
    vectors = {name: encode(np.full(5000, 3.0)) for name in "abc"}
    for masked in mask(vectors, np.random.default_rng(0)).values():
        assert kstest(masked.astype(float) / 2**64, "uniform").pvalue > 1e-3


def test_each_view_shows_what_it_may(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    x, y = private
    sites = {"a": (x[:4], y[:4]), "b": (x[4:6], y[4:6]), "c": (x[6:7], y[6:7])}
    random = np.random.default_rng(0)
    plain = observe(images.model, sites, Protection("plain"), random)
    assert [(o.what, o.num_rows, o.sites) for o in plain] == [
        ("update", 4, ("a",)), ("update", 2, ("b",)), ("update", 1, ("c",)),
    ]  # fmt: skip
    own = batch_gradient(images.model, x[:4], y[:4])
    assert all(torch.allclose(plain[0].gradient[name], g, atol=1e-6) for name, g in own.items())
    *masked, total = observe(images.model, sites, Protection("secagg"), random)
    assert [o.what for o in masked] == ["masked"] * 3
    assert (total.what, total.num_rows, total.sites) == ("sum", 7, ("a", "b", "c"))
    pooled = batch_gradient(images.model, x[:7], y[:7])
    assert all(torch.allclose(total.gradient[name], g, atol=1e-6) for name, g in pooled.items())
    for one in masked:
        assert float(one.gradient["4.weight"].abs().median()) > 1e6  # far from any gradient


@pytest.mark.parametrize(("kind", "deviation"), [("dp", 2.0 / 2), ("secagg+dp", 2.0 / 4)])
def test_noise_has_the_stated_size(
    images: Subject, private: tuple[torch.Tensor, ...], kind: str, deviation: float
) -> None:
    """In a mean over n rows, of a sum with noise multiplier · clip: the sites' parts make one whole in a sum."""
    x, y = private
    sites = {"a": (x[:2], y[:2]), "b": (x[2:4], y[2:4])}
    protection = Protection(kind, clip_norm_l2=0.5, noise_multiplier=4.0)  # type: ignore[arg-type]
    seen = observe(images.model, sites, protection, np.random.default_rng(0))[-1]
    noise = torch.cat([g.flatten() for g in seen.gradient.values()]).std()
    assert float(noise) == pytest.approx(deviation, rel=0.02)


def test_dp_without_noise_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        Protection("dp", clip_norm_l2=1.0)
    assert caught.value.code == "audit.no-noise"
