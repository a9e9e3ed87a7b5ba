"""Inception-v1 (GoogLeNet) with batch normalisation in place of local response normalisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images, check_share


class _Widths(NamedTuple):
    """Output channels of a block's convolutions, as the columns of the paper's table 1."""

    one: int
    reduce_three: int
    three: int
    reduce_five: int
    five: int
    pool: int

    @property
    def total(self) -> int:
        return self.one + self.three + self.five + self.pool


_3A, _3B = _Widths(64, 96, 128, 16, 32, 32), _Widths(128, 128, 192, 32, 96, 64)
_4A, _4B, _4C, _4D, _4E = (
    _Widths(192, 96, 208, 16, 48, 64),
    _Widths(160, 112, 224, 24, 64, 64),
    _Widths(128, 128, 256, 24, 64, 64),
    _Widths(112, 144, 288, 32, 64, 64),
    _Widths(256, 160, 320, 32, 128, 128),
)
_5A, _5B = _Widths(256, 160, 320, 32, 128, 128), _Widths(384, 192, 384, 48, 128, 128)


class InceptionV1(nn.Module):
    """GoogLeNet without its auxiliary outputs; 7,005,832 parameters for 1,000 classes.

    Args:
        num_classes: number of outputs.
        dropout: share of the last layer's inputs that training drops.

    Raises:
        ConfigError: an argument is out of its range.

    Source: Szegedy and others, CVPR 2015, table 1; batch normalisation after Ioffe, Szegedy, ICML 2015.
    """

    image_shape = (3, 224, 224)

    def __init__(self, *, num_classes: int = 1000, dropout: float = 0.4) -> None:
        super().__init__()
        check_count("inception_v1", "num_classes", num_classes)
        check_share("inception_v1", "dropout", dropout)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            _convolution(3, 64, 7, stride=2),  # (batch, 64, 112, 112)
            _pooling(),
            _convolution(64, 64, 1),
            _convolution(64, 192, 3),  # (batch, 192, 56, 56)
            _pooling(),
            *_inceptions(192, _3A, _3B),  # (batch, 480, 28, 28)
            _pooling(),
            *_inceptions(_3B.total, _4A, _4B, _4C, _4D, _4E),  # (batch, 832, 14, 14)
            _pooling(),
            *_inceptions(_4E.total, _5A, _5B),  # (batch, 1024, 7, 7)
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_5B.total, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, 3, 224, 224).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("inception_v1", images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits


class _Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, in_channels: int, widths: _Widths) -> None:
        super().__init__()
        self.one = _convolution(in_channels, widths.one, 1)
        self.three = nn.Sequential(
            _convolution(in_channels, widths.reduce_three, 1), _convolution(widths.reduce_three, widths.three, 3)
        )
        self.five = nn.Sequential(
            _convolution(in_channels, widths.reduce_five, 1), _convolution(widths.reduce_five, widths.five, 5)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(in_channels, widths.pool, 1))

    def forward(self, features: Tensor) -> Tensor:
        """All branches of (batch, in_channels, height, width): (batch, widths.total, height, width)."""
        return torch.cat([self.one(features), self.three(features), self.five(features), self.pool(features)], dim=1)


def _inceptions(in_channels: int, *blocks: _Widths) -> list[nn.Module]:
    inputs = [in_channels, *(block.total for block in blocks)]
    return [_Inception(*pair) for pair in zip(inputs, blocks, strict=False)]


def _convolution(in_channels: int, out_channels: int, side: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps height and width (but for the stride), normalised; so it needs no bias."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, side, stride, padding=side // 2, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-3),
        nn.ReLU(inplace=True),
    )


def _pooling() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
