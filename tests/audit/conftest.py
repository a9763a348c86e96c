"""A small federation to attack: blurred random shapes as images, a CNN, and a logistic regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from atoll.audit.audit import Subject  # noqa: E402


def shapes(number: int, seed: int, size: int = 16) -> Tensor:
    """Images [number, 1, size, size] in [0, 1]: three soft blobs each, so that public ones are a prior for others."""
    made = torch.Generator().manual_seed(seed)
    grid = torch.arange(size) / (size - 1)
    image = torch.zeros(number, size, size)
    for _ in range(3):
        x, y, width, light = torch.rand(4, number, generator=made)
        near = (grid[None, :, None] - y[:, None, None]) ** 2 + (grid[None, None, :] - x[:, None, None]) ** 2
        image += (0.3 + light)[:, None, None] * torch.exp(-near / (2 * (0.08 + 0.15 * width)[:, None, None] ** 2))
    return image[:, None].clamp(0, 1)


def cnn(hidden: int = 48, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12 * 64, hidden), nn.ReLU(), nn.Linear(hidden, 1),
    )  # fmt: skip


def rounds_of(
    x: Tensor, y: Tensor, sites: int, batch: int, number: int
) -> Sequence[Mapping[str, tuple[Tensor, Tensor]]]:
    parts = list(zip(torch.split(x, batch), torch.split(y, batch), strict=True))
    names = [f"hospital-{i}" for i in range(sites)]
    return [dict(zip(names, parts[r * sites : (r + 1) * sites], strict=True)) for r in range(number)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images() -> Subject:
    return Subject(cnn(), shapes(400, seed=1))


@pytest.fixture(scope="session")
def private() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    return shapes(96, seed=2), torch.randint(0, 2, (96,), generator=made).float()


@pytest.fixture(scope="session")
def rows() -> tuple[Subject, Tensor, Tensor]:
    made = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    x = 2 * torch.rand(400, 6, generator=made) - 1
    y = (x.sum(1) + 0.5 * torch.randn(400, generator=made) > 0).float()
    return Subject(nn.Sequential(nn.Linear(6, 1)), x[:200]), x[200:], y[200:]
