"""Inception-v3. Names and shapes of the parameters are torchvision's, so its weights can be loaded.

Source: Szegedy and others, "Rethinking the Inception architecture for computer vision", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpidl.models.blocks import Convolution
from mpidl.models.checks import check_count, check_images, check_share, check_switch

_SMALLEST, _SMALLEST_WITH_HEAD = 75, 299


def inception_v3(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 299,
    dropout: float = 0.5,
    auxiliary_head: bool = True,
) -> nn.Module:
    """Make Inception-v3: 27,161,264 parameters for 1,000 classes, 23,834,568 without its auxiliary head."""
    return InceptionV3(num_classes, in_channels, image_size, dropout, auxiliary_head)


class InceptionV3(nn.Module):
    """Eleven blocks of branches with factored convolutions, and an auxiliary head.

    Args:
        num_classes: number of outputs.
        in_channels: the images' channels.
        image_size: the images' height and width; at least 75, and 299 with the auxiliary head.
        dropout: share of the last layer's inputs that training drops.
        auxiliary_head: whether there is another classifier while training, whose logits come second.

    Raises:
        ConfigError: an argument is out of its range.
    """

    auxiliary_weight = 0.3
    """Of the auxiliary head's loss, as in GoogLeNet; the paper names none."""

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, dropout: float, auxiliary_head: bool
    ) -> None:
        super().__init__()
        check_count("inception_v3", "num_classes", num_classes)
        check_count("inception_v3", "in_channels", in_channels)
        check_switch("inception_v3", "auxiliary_head", auxiliary_head)
        check_count("inception_v3", "image_size", image_size, _SMALLEST_WITH_HEAD if auxiliary_head else _SMALLEST)
        check_share("inception_v3", "dropout", dropout)
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        self.Conv2d_1a_3x3 = Convolution(in_channels, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _InceptionA(192, pool=32)  # (batch, 256, 35, 35) of 299x299
        self.Mixed_5c = _InceptionA(256, pool=64)
        self.Mixed_5d = _InceptionA(288, pool=64)
        self.Mixed_6a = _ReductionA(288)  # (batch, 768, 17, 17)
        self.Mixed_6b = _InceptionB(128)
        self.Mixed_6c = _InceptionB(160)
        self.Mixed_6d = _InceptionB(160)
        self.Mixed_6e = _InceptionB(192)
        if auxiliary_head:
            self.AuxLogits = _Head(num_classes)
        self._has_head = auxiliary_head
        self.Mixed_7a = _ReductionB()  # (batch, 1280, 8, 8)
        self.Mixed_7b = _InceptionC(1280)
        self.Mixed_7c = _InceptionC(2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, image_size, image_size); at least two while training with the
                auxiliary head, for its last normalisation.

        Returns:
            Logits, (batch, num_classes); in training with the auxiliary head, twice.

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("inception_v3", images, self.image_shape)
        features = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        features = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(features)))
        features = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(features))))
        middle = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(features)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(middle))).mean(dim=(2, 3))  # (batch, 2048)
        logits: Tensor = self.fc(self.dropout(features))
        if self.training and self._has_head:
            return logits, self.AuxLogits(middle)
        return logits


def _chain(features: Tensor, *modules: Callable[[Tensor], Tensor]) -> Tensor:
    for module in modules:
        features = module(features)
    return features


def _row(in_channels: int, out_channels: int, length: int) -> Convolution:
    return Convolution(in_channels, out_channels, (1, length), padding=(0, length // 2))


def _column(in_channels: int, out_channels: int, length: int) -> Convolution:
    return Convolution(in_channels, out_channels, (length, 1), padding=(length // 2, 0))


def _average(features: Tensor) -> Tensor:
    return functional.avg_pool2d(features, 3, stride=1, padding=1)


class _InceptionA(nn.Module):
    """Branches of 1x1, 5x5, two 3x3 and a pooling (the paper's figure 5)."""

    def __init__(self, in_channels: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 64, 1)
        self.branch5x5_1 = Convolution(in_channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(in_channels, pool, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, 224 + pool, height, width)."""
        five = _chain(features, self.branch5x5_1, self.branch5x5_2)
        three = _chain(features, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(features), five, three, self.branch_pool(_average(features))], dim=1)


class _ReductionA(nn.Module):
    """Half the height and width: 3x3, two 3x3 and a pooling, side by side (figure 10)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, 2n + 1, 2n + 1) to (batch, 480 + in_channels, n, n)."""
        double = _chain(features, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(features), double, functional.max_pool2d(features, 3, stride=2)], dim=1)


class _InceptionB(nn.Module):
    """Branches of 1x1, 7x7 and two 7x7, each factored into 1x7 and 7x1, and a pooling (figure 6)."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, inner, 1)
        self.branch7x7_2 = _row(inner, inner, 7)
        self.branch7x7_3 = _column(inner, 192, 7)
        self.branch7x7dbl_1 = Convolution(768, inner, 1)
        self.branch7x7dbl_2 = _column(inner, inner, 7)
        self.branch7x7dbl_3 = _row(inner, inner, 7)
        self.branch7x7dbl_4 = _column(inner, inner, 7)
        self.branch7x7dbl_5 = _row(inner, 192, 7)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 768, height, width) to the same."""
        seven = _chain(features, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _chain(
            features,
            self.branch7x7dbl_1,
            self.branch7x7dbl_2,
            self.branch7x7dbl_3,
            self.branch7x7dbl_4,
            self.branch7x7dbl_5,
        )
        return torch.cat([self.branch1x1(features), seven, double, self.branch_pool(_average(features))], dim=1)


class _ReductionB(nn.Module):
    """Half the height and width: 3x3, 7x7 before 3x3, and a pooling, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 768, 2n + 1, 2n + 1) to (batch, 1280, n, n)."""
        three = _chain(features, self.branch3x3_1, self.branch3x3_2)
        seven = _chain(features, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat([three, seven, functional.max_pool2d(features, 3, stride=2)], dim=1)


class _InceptionC(nn.Module):
    """Branches of 1x1, 3x3 split into 1x3 beside 3x1, the same after another 3x3, and a pooling (figure 7)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 320, 1)
        self.branch3x3_1 = Convolution(in_channels, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(in_channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = Convolution(in_channels, 192, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, 2048, height, width)."""
        three = self.branch3x3_1(features)
        double = _chain(features, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(features),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(_average(features)),
        ]
        return torch.cat(branches, dim=1)


class _Head(nn.Module):
    """The auxiliary classifier, of (batch, 768, 17, 17)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv0 = Convolution(768, 128, 1)
        self.conv1 = Convolution(128, 768, 5)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, 768, height, width) to logits, (batch, num_classes)."""
        features = functional.avg_pool2d(features, 5, stride=3)
        logits: Tensor = self.fc(_chain(features, self.conv0, self.conv1).mean(dim=(2, 3)))
        return logits
