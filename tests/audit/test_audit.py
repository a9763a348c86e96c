"""The whole audit: attacks succeed on plain updates and fail on what protections let the coordinator see."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from atoll.audit.audit import Subject, attack_rounds, audit  # noqa: E402
from atoll.audit.leak import Criterion  # noqa: E402
from atoll.audit.view import Protection  # noqa: E402
from atoll.contract.errors import PlanError  # noqa: E402

from .conftest import rounds_of  # noqa: E402

NOISY = Protection("dp", clip_norm_l2=1.0, noise_multiplier=0.6, epsilon=8.0)
BOTH = Protection("secagg+dp", clip_norm_l2=1.0, noise_multiplier=0.6, epsilon=8.0)


def leak_rate(subject: Subject, rounds: object, protection: Protection, attack: str) -> float:
    (leak,) = attack_rounds(subject, rounds, protection, (attack,), steps=150)  # type: ignore[arg-type]
    return float(leak.leaked.mean())


def test_a_linear_model_at_batch_1(rows: tuple[Subject, torch.Tensor, torch.Tensor]) -> None:
    subject, x, y = rows
    rounds = rounds_of(x, y, sites=3, batch=1, number=20)
    assert leak_rate(subject, rounds, Protection("plain"), "linear-layer") == 1.0
    for protection in (NOISY, BOTH, Protection("secagg")):
        assert leak_rate(subject, rounds, protection, "linear-layer") == 0.0


def test_a_linear_model_at_batch_8_shows_no_row(rows: tuple[Subject, torch.Tensor, torch.Tensor]) -> None:
    subject, x, y = rows
    assert leak_rate(subject, rounds_of(x, y, 3, 8, 4), Protection("plain"), "linear-layer") == 0.0


@pytest.mark.parametrize("batch", [1, 8])
def test_images_leak_without_protection_and_not_through_noise(
    images: Subject, private: tuple[torch.Tensor, ...], batch: int
) -> None:
    rounds = rounds_of(*private, sites=2, batch=batch, number=1)
    assert leak_rate(images, rounds, Protection("plain"), "linear-layer") > 0.8
    assert leak_rate(images, rounds, Protection("plain"), "no-gradient") == 0.0
    for protection in (NOISY, BOTH):
        assert leak_rate(images, rounds, protection, "linear-layer") == 0.0


def test_a_sum_over_few_rows_is_still_a_small_batch(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    """Secure aggregation hides whose a gradient is, not what a sum over two rows says: this must stay visible."""
    rounds = rounds_of(*private, sites=2, batch=1, number=3)
    assert leak_rate(images, rounds, Protection("secagg"), "linear-layer") > 0.8
    rounds = rounds_of(*private, sites=2, batch=48, number=1)
    assert leak_rate(images, rounds, Protection("secagg"), "linear-layer") < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["generative", "inverting-gradients"])
def test_search_by_gradient_finds_single_images(
    images: Subject, private: tuple[torch.Tensor, ...], attack: str
) -> None:
    lenient = Subject(images.model, images.public, criterion=Criterion(0.5, 0.0))
    rounds = rounds_of(*private, sites=2, batch=1, number=4)
    assert leak_rate(lenient, rounds, Protection("plain"), attack) >= 0.5
    assert leak_rate(lenient, rounds, NOISY, attack) == 0.0


def test_results_are_json_with_pictures_and_repeat(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    rounds = rounds_of(*private, sites=2, batch=1, number=2)
    chosen = ("linear-layer", "generative", "inverting-gradients", "no-gradient", "imprint")
    result, png = audit(images, rounds, Protection("plain"), chosen, steps=20)  # type: ignore[arg-type]
    assert result == audit(images, rounds, Protection("plain"), chosen, steps=20)[0]  # type: ignore[arg-type]
    told = json.loads(json.dumps(result, allow_nan=False))
    assert [one["attack"] for one in told["attacks"]] == list(chosen)
    assert (told["by"], told["sites"], told["batch_size"]) == ("linear-layer", 2, 1)
    assert told["leak_rate"] == told["attacks"][0]["reconstructed"] / 4
    assert png is not None
    with Image.open(io.BytesIO(png)) as sheet:
        assert sheet.format == "PNG"


def test_tables_have_results_and_no_pictures(rows: tuple[Subject, torch.Tensor, torch.Tensor]) -> None:
    subject, x, y = rows
    result, png = audit(subject, rounds_of(x, y, 3, 1, 3), NOISY)
    assert png is None
    assert result["leak_rate"] == 0.0
    assert result["epsilon"] == 8.0
    assert {one["attack"] for one in result["attacks"]} == {"linear-layer", "no-gradient"}
    json.dumps(result, allow_nan=False)


def test_nothing_to_attack_is_refused(images: Subject) -> None:
    with pytest.raises(PlanError) as caught:
        audit(images, [], Protection("plain"))
    assert caught.value.code == "audit.no-rounds"
