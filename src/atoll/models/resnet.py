"""A small residual network for images: stages of blocks that add to what they are given.

A 3 × 3 convolution, then for each of ``widths`` a stage of ``blocks`` blocks, every stage but the first at half the
height and width; the mean over all places is the representation. A block is two 3 × 3 convolutions, each normalised,
beside the identity, or a 1 × 1 convolution where the size changes (option B). Normalisation is by groups of channels
by default: batch statistics of unlike sites do not average well, and no row then has a gradient of its own.

Sources: He, Zhang, Ren & Sun 2016, Deep Residual Learning for Image Recognition (CVPR), §3.3 and §4.2 (the network for
small images); Wu & He 2018, Group Normalization (ECCV); Hsieh et al. 2020, The Non-IID Data Quagmire of Decentralized
Machine Learning (ICML), §5 (group instead of batch normalisation).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.models.images import ImageNetwork, ImageSpec, Norm, image_shape, normalised
from atoll.models.model import Units, model


class ResNetSpec(ImageSpec):
    """widths: channels of each stage. blocks: of each stage. The rest: see
    :class:`atoll.models.images.ImageSpec`."""

    kind: Literal["resnet"] = "resnet"
    widths: tuple[Units, ...] = Field(default=(16, 32, 64), min_length=1, max_length=5)
    blocks: int = Field(default=1, ge=1, le=16)
    norm: Norm = "group"


class Block(nn.Module):
    """relu(F(x) + x), He et al. 2016, equations 1 and 2."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *convolution(inputs, outputs, 3, stride, norm), nn.ReLU(), *convolution(outputs, outputs, 3, 1, norm)
        )
        same = (inputs, stride) == (outputs, 1)
        self.beside = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride, norm))

    def forward(self, x: Tensor) -> Tensor:
        """[num_rows, inputs, height, width] → [num_rows, outputs, height / stride, width / stride]."""
        return F.relu(self.inner(x) + self.beside(x))


class Mean(nn.Module):
    """Over all places."""

    def forward(self, x: Tensor) -> Tensor:
        """[num_rows, channels, height, width] → [num_rows, channels]."""
        return x.mean((2, 3))


@model
class ResNet(ImageNetwork):
    """See the module's docstring."""

    Spec: ClassVar[type[ResNetSpec]] = ResNetSpec
    settings: ResNetSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """First convolution, stages, mean."""
        s = self.settings
        width = s.widths[0]
        layers = [*convolution(image_shape(self.schema, s.image)[2], width, 3, 1, s.norm), nn.ReLU()]
        for stage, wider in enumerate(s.widths):
            for block in range(s.blocks):
                layers.append(Block(width, wider, 2 if stage and not block else 1, s.norm))
                width = wider
        return nn.Sequential(*layers, Mean()), width


def convolution(inputs: int, outputs: int, size: int, stride: int, norm: Norm) -> list[nn.Module]:
    """With its normalisation, whose offsets stand for its own where there is one."""
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=norm == "none"), *normalised(norm, outputs)]
