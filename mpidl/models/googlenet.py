"""GoogLeNet, which is Inception-v1: as in the paper, as torchvision has it, and as it is measured most.

While training, those with auxiliary heads return (logits, first head's, second head's); `auxiliary_weight` says how
much the heads count, and `mpidl.losses` adds them up. In evaluation mode all return logits alone.

Source: Szegedy and others, "Going deeper with convolutions", CVPR 2015, table 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpidl.models.blocks import Convolution
from mpidl.models.checks import check_count, check_images, check_share, check_switch


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


class _Variant(NamedTuple):
    """Where the networks differ.

    Attributes:
        batch_norm: whether convolutions are normalised; if not, there is local response normalisation.
        kernel: side of the convolutions that the paper has at 5.
        last_pool: side of the last pooling's windows.
    """

    batch_norm: bool
    kernel: int
    last_pool: int


_BLOCKS = {
    "inception3a": _Widths(64, 96, 128, 16, 32, 32),
    "inception3b": _Widths(128, 128, 192, 32, 96, 64),
    "inception4a": _Widths(192, 96, 208, 16, 48, 64),
    "inception4b": _Widths(160, 112, 224, 24, 64, 64),
    "inception4c": _Widths(128, 128, 256, 24, 64, 64),
    "inception4d": _Widths(112, 144, 288, 32, 64, 64),
    "inception4e": _Widths(256, 160, 320, 32, 128, 128),
    "inception5a": _Widths(256, 160, 320, 32, 128, 128),
    "inception5b": _Widths(384, 192, 384, 48, 128, 128),
}


def googlenet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    dropout: float = 0.4,
    auxiliary_heads: bool = True,
) -> nn.Module:
    """Make the paper's GoogLeNet: 13,378,280 parameters for 1,000 classes, 6,998,552 without its auxiliary heads.

    Local response normalisation, biases, weights drawn after Glorot, as BigDL's Inception_v1.
    """
    variant = _Variant(batch_norm=False, kernel=5, last_pool=3)
    return GoogLeNet("googlenet", variant, num_classes, in_channels, image_size, dropout, auxiliary_heads)


def googlenet_bn(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    dropout: float = 0.2,
    auxiliary_heads: bool = True,
) -> nn.Module:
    """Make torchvision's googlenet: 13,004,888 parameters for 1,000 classes, 6,624,904 without its auxiliary heads.

    With batch normalisation; 3x3 convolutions stand where the paper has 5x5. Names and shapes of the parameters are
    torchvision's, so its weights can be loaded.
    """
    variant = _Variant(batch_norm=True, kernel=3, last_pool=2)
    return GoogLeNet("googlenet_bn", variant, num_classes, in_channels, image_size, dropout, auxiliary_heads)


def inception_v1(
    *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.4
) -> nn.Module:
    """Make the paper's network with batch normalisation, without auxiliary heads: 7,005,832 parameters."""
    variant = _Variant(batch_norm=True, kernel=5, last_pool=3)
    return GoogLeNet("inception_v1", variant, num_classes, in_channels, image_size, dropout, auxiliary_heads=False)


class GoogLeNet(nn.Module):
    """Nine Inception blocks of four branches, and up to two auxiliary heads.

    Args:
        name: of the model, for messages.
        variant: which of the networks.
        num_classes: number of outputs.
        in_channels: the images' channels.
        image_size: the images' height and width, at least 32.
        dropout: share of the last layer's inputs that training drops.
        auxiliary_heads: whether there are two more classifiers, after the blocks 4a and 4d, while training.

    Raises:
        ConfigError: an argument is out of its range.
    """

    auxiliary_weight = 0.3
    """Of each auxiliary head's loss (section 5 of the paper)."""

    inception3a: nn.Module
    inception3b: nn.Module
    inception4a: nn.Module
    inception4b: nn.Module
    inception4c: nn.Module
    inception4d: nn.Module
    inception4e: nn.Module
    inception5a: nn.Module
    inception5b: nn.Module

    def __init__(
        self,
        name: str,
        variant: _Variant,
        num_classes: int,
        in_channels: int,
        image_size: int,
        dropout: float,
        auxiliary_heads: bool,
    ) -> None:
        super().__init__()
        check_count(name, "num_classes", num_classes)
        check_count(name, "in_channels", in_channels)
        check_count(name, "image_size", image_size, 32)
        check_share(name, "dropout", dropout)
        check_switch(name, "auxiliary_heads", auxiliary_heads)
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        self._name = name
        norm = variant.batch_norm
        self.conv1 = Convolution(in_channels, 64, 7, stride=2, padding=3, batch_norm=norm)
        self.conv2 = Convolution(64, 64, 1, batch_norm=norm)
        self.conv3 = Convolution(64, 192, 3, padding=1, batch_norm=norm)
        channels = 192
        for block, widths in _BLOCKS.items():
            self.add_module(block, _Inception(channels, widths, variant))
            channels = widths.total
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.last_pool = nn.MaxPool2d(variant.last_pool, 2, ceil_mode=True)
        self.normalize = nn.Identity() if norm else nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        if auxiliary_heads:
            self.aux1 = _Head(_BLOCKS["inception4a"].total, num_classes, variant, image_size)
            self.aux2 = _Head(_BLOCKS["inception4d"].total, num_classes, variant, image_size)
        self._has_heads = auxiliary_heads
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        if not norm:
            _initialize(self)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, image_size, image_size).

        Returns:
            Logits, (batch, num_classes); in training with auxiliary heads, three times.

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images(self._name, images, self.image_shape)
        features = self.normalize(self.pool(self.conv1(images)))  # (batch, 64, 56, 56) of 224x224
        features = self.pool(self.normalize(self.conv3(self.conv2(features))))  # (batch, 192, 28, 28)
        features = self.pool(self.inception3b(self.inception3a(features)))  # (batch, 480, 14, 14)
        after_4a = self.inception4a(features)
        after_4d = self.inception4d(self.inception4c(self.inception4b(after_4a)))
        features = self.last_pool(self.inception4e(after_4d))  # (batch, 832, 7, 7)
        features = self.inception5b(self.inception5a(features)).mean(dim=(2, 3))  # (batch, 1024)
        logits: Tensor = self.fc(self.dropout(features))
        if self.training and self._has_heads:
            return logits, self.aux1(after_4a), self.aux2(after_4d)
        return logits


class _Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, in_channels: int, widths: _Widths, variant: _Variant) -> None:
        super().__init__()
        norm, kernel = variant.batch_norm, variant.kernel
        self.branch1 = Convolution(in_channels, widths.one, 1, batch_norm=norm)
        self.branch2 = nn.Sequential(
            Convolution(in_channels, widths.reduce_three, 1, batch_norm=norm),
            Convolution(widths.reduce_three, widths.three, 3, padding=1, batch_norm=norm),
        )
        self.branch3 = nn.Sequential(
            Convolution(in_channels, widths.reduce_five, 1, batch_norm=norm),
            Convolution(widths.reduce_five, widths.five, kernel, padding=kernel // 2, batch_norm=norm),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), Convolution(in_channels, widths.pool, 1, batch_norm=norm)
        )

    def forward(self, features: Tensor) -> Tensor:
        """All branches of (batch, in_channels, height, width): (batch, widths.total, height, width)."""
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(features) for branch in branches], dim=1)


class _Head(nn.Module):
    """An auxiliary classifier."""

    def __init__(self, in_channels: int, num_classes: int, variant: _Variant, image_size: int) -> None:
        super().__init__()
        # The paper's windows bring 14x14 to 4x4; torchvision's, which also bring other sizes there, are others.
        is_paper = not variant.batch_norm and image_size == 224
        self.pool = nn.AvgPool2d(5, stride=3) if is_paper else nn.AdaptiveAvgPool2d(4)
        self.conv = Convolution(in_channels, 128, 1, batch_norm=variant.batch_norm)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to logits, (batch, num_classes)."""
        hidden = torch.flatten(self.conv(self.pool(features)), 1)
        logits: Tensor = self.fc2(self.dropout(nn.functional.relu(self.fc1(hidden))))
        return logits


def _initialize(model: nn.Module) -> None:
    """Glorot's initialisation, without which the network that does not normalise learns nothing for long."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
