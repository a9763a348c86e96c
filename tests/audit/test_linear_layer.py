"""Exact inversion of the first fully connected layer, against gradients of torch itself."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from atoll.audit.audit import Subject  # noqa: E402
from atoll.audit.imprint import imprint  # noqa: E402
from atoll.audit.linear_layer import factorise, infer_labels, ratios  # noqa: E402
from atoll.audit.network import Layers, batch_gradient, features  # noqa: E402


def found_share(model: nn.Module, layers: Layers, x: torch.Tensor, y: torch.Tensor) -> tuple[float, int]:
    """Share of the batch whose inputs of the layer are found to 1 %, and how many were claimed."""
    found = factorise(model, batch_gradient(model, x, y), layers, len(x))
    true = features(model, layers.linear, x).detach()
    if not len(found.inputs):
        return 0.0, 0
    nearest = (torch.cdist(true, found.inputs) / true.norm(dim=1, keepdim=True)).amin(1)
    return float((nearest < 0.01).float().mean()), len(found.inputs)


def test_layers_are_found_as_they_run(images: Subject) -> None:
    layers = Layers.of(images.model, images.public[:1])
    assert layers == Layers("4", "6", convolutional=True)
    assert Layers.of(nn.Sequential(nn.Linear(6, 1)), torch.zeros(1, 6)) == Layers("0", None, convolutional=False)
    assert Layers.of(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8)) is None
    assert Layers.of(nn.Linear(6, 1, bias=False), torch.zeros(1, 6)) is None


def test_a_single_row_of_a_linear_model_is_a_quotient(rows: tuple[Subject, torch.Tensor, torch.Tensor]) -> None:
    subject, x, y = rows
    for i in range(20):
        gradient = batch_gradient(subject.model, x[i : i + 1], y[i : i + 1])
        assert torch.allclose(ratios(gradient, "0").float(), x[i : i + 1], atol=1e-4)
        assert infer_labels(subject.model, gradient, 1, subject.public) == int(y[i])


def test_a_batch_of_a_linear_model_gives_its_weighted_mean_only(
    rows: tuple[Subject, torch.Tensor, torch.Tensor],
) -> None:
    subject, x, y = rows
    gradient = batch_gradient(subject.model, x[:8], y[:8])
    residual = torch.sigmoid(subject.model(x[:8]))[:, 0] - y[:8]
    mean = (residual[:, None] * x[:8]).sum(0) / residual.sum()
    assert torch.allclose(ratios(gradient, "0").float()[0], mean, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_behind_a_relu_layer_is_found_exactly(
    images: Subject, private: tuple[torch.Tensor, ...], batch: int
) -> None:
    layers = Layers.of(images.model, images.public[:1])
    assert layers is not None
    share, claimed = found_share(images.model, layers, private[0][:batch], private[1][:batch])
    assert share == 1.0
    assert claimed == batch


def test_what_is_claimed_is_true_even_where_most_cannot_be_told_apart(
    images: Subject, private: tuple[torch.Tensor, ...]
) -> None:
    layers = Layers.of(images.model, images.public[:1])
    assert layers is not None
    share, claimed = found_share(images.model, layers, private[0], private[1])
    assert round(share * 96) == claimed < 96


def test_labels_come_with_the_samples_and_their_number_without(
    images: Subject, private: tuple[torch.Tensor, ...]
) -> None:
    x, y = private[0][:8], private[1][:8]
    gradient = batch_gradient(images.model, x, y)
    layers = Layers.of(images.model, x[:1])
    assert layers is not None
    assert sorted(factorise(images.model, gradient, layers, 8).labels) == sorted(int(v) for v in y)
    assert infer_labels(images.model, gradient, 8, images.public) == int(y.sum())


def test_two_logits_are_as_good_as_one(private: tuple[torch.Tensor, ...]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2))
    layers = Layers.of(model, private[0][:1])
    assert layers == Layers("1", "3", convolutional=False)
    assert found_share(model, layers, private[0][:6], private[1][:6]) == (1.0, 6)


def test_lying_weights_isolate_samples_of_large_batches(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    layers = Layers.of(images.model, images.public[:1])
    assert layers is not None
    honest, _ = found_share(images.model, layers, private[0][:64], private[1][:64])
    lying = imprint(images.model, layers, images.public)
    share, claimed = found_share(lying, layers, private[0][:64], private[1][:64])
    assert share > max(honest, 0.2)
    assert claimed == round(share * 64)
    shapes = {name: value.shape for name, value in images.model.named_parameters()}
    assert {name: value.shape for name, value in lying.named_parameters()} == shapes


def test_noise_leaves_nothing(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    layers = Layers.of(images.model, images.public[:1])
    assert layers is not None
    gradient = batch_gradient(images.model, private[0][:8], private[1][:8], clip_norm_l2=1.0)
    made = torch.Generator().manual_seed(0)
    noisy = {name: g + 0.1 * torch.randn(g.shape, generator=made) for name, g in gradient.items()}
    assert len(factorise(images.model, noisy, layers, 8).inputs) == 0


def test_clipping_bounds_every_record(images: Subject, private: tuple[torch.Tensor, ...]) -> None:
    for i in range(4):
        one = batch_gradient(images.model, private[0][i : i + 1], private[1][i : i + 1], clip_norm_l2=0.01)
        norm = torch.cat([g.flatten() for g in one.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)
    loose = batch_gradient(images.model, private[0][:4], private[1][:4], clip_norm_l2=1e6)
    for name, g in batch_gradient(images.model, private[0][:4], private[1][:4]).items():
        assert torch.allclose(loose[name], g, atol=1e-6)
