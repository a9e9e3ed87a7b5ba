"""VGG networks for ImageNet, as in the paper; `vgg_small.py` has those for 32x32 images.

Names and shapes of the parameters are torchvision's, so its weights can be loaded.

Source: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images, check_share

_VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
_VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


def vgg16(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5) -> nn.Module:
    """Make VGG-16, configuration D: 138,357,544 parameters for 1,000 classes."""
    return VGG("vgg16", _VGG16, False, num_classes, in_channels, image_size, dropout)


def vgg16_bn(
    *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5
) -> nn.Module:
    """Make VGG-16 with batch normalisation: 138,365,992 parameters for 1,000 classes."""
    return VGG("vgg16_bn", _VGG16, True, num_classes, in_channels, image_size, dropout)


def vgg19(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5) -> nn.Module:
    """Make VGG-19, configuration E: 143,667,240 parameters for 1,000 classes."""
    return VGG("vgg19", _VGG19, False, num_classes, in_channels, image_size, dropout)


def vgg19_bn(
    *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5
) -> nn.Module:
    """Make VGG-19 with batch normalisation: 143,678,248 parameters for 1,000 classes."""
    return VGG("vgg19_bn", _VGG19, True, num_classes, in_channels, image_size, dropout)


class VGG(nn.Module):
    """Five blocks of convolutions, each ending in a pooling, and three linear layers.

    Args:
        name: of the model, for messages.
        blocks: output channels of the convolutions of every block.
        batch_norm: whether each convolution is followed by a batch normalisation.
        num_classes: number of outputs.
        in_channels: the images' channels.
        image_size: the images' height and width, at least 32; the linear layers see 7x7 maps whatever it is.
        dropout: share of the hidden linear layers' values that training drops.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[Sequence[int]],
        batch_norm: bool,
        num_classes: int,
        in_channels: int,
        image_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        check_count(name, "num_classes", num_classes)
        check_count(name, "in_channels", in_channels)
        check_count(name, "image_size", image_size, 32)
        check_share(name, "dropout", dropout)
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        self._name = name
        self.features = nn.Sequential(*_features(blocks, in_channels, batch_norm))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(blocks[-1][-1] * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, image_size, image_size).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images(self._name, images, self.image_shape)
        features = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(torch.flatten(features, 1))
        return logits


def _features(blocks: Sequence[Sequence[int]], in_channels: int, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in blocks:
        for out_channels in block:
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return layers


def _initialize(model: nn.Module) -> None:
    """He's initialisation, without which the networks that do not normalise learn nothing for long."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
