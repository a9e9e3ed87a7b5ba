"""VGG networks for 32x32 images, with batch normalisation and dropout, as BigDL builds them for CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images

_VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class _VGG(nn.Module):
    """Blocks of convolutions, each ending in a pooling, and two linear layers.

    Args:
        name: of the model, for messages.
        blocks: output channels of the convolutions of every block; five blocks bring 32x32 down to 1x1.
        num_classes: number of outputs.
    """

    image_shape = (3, 32, 32)

    def __init__(self, name: str, blocks: Sequence[Sequence[int]], num_classes: int) -> None:
        super().__init__()
        check_count(name, "num_classes", num_classes)
        self.num_classes = num_classes
        self._name = name
        layers: list[nn.Module] = []
        in_channels = self.image_shape[0]
        for block in blocks:
            for index, out_channels in enumerate(block):
                layers += _convolution(in_channels, out_channels)
                if index < len(block) - 1:
                    layers.append(nn.Dropout(0.4 if len(layers) > 3 else 0.3))
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(in_channels, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(512, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, 3, 32, 32); at least two while training, for the last normalisation.

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images(self._name, images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits


class VGG16(_VGG):
    """BigDL's VGG-16 for CIFAR-10: 13 convolutions, 2 linear layers; 14,991,946 parameters for ten classes.

    It ends in logits, where the original has a LogSoftMax.

    Args:
        num_classes: number of outputs.

    Raises:
        ConfigError: the argument is not a positive integer.

    Source: VggForCifar10 in BigDL's models/vgg; Simonyan, Zisserman, ICLR 2015, configuration D.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__("vgg16_32", _VGG16, num_classes)


class VGG13(_VGG):
    """The same with two convolutions in every block; 9,679,690 parameters for ten classes.

    Args:
        num_classes: number of outputs.

    Raises:
        ConfigError: the argument is not a positive integer.

    Source: Simonyan, Zisserman, ICLR 2015, configuration B.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__("vgg13_32", _VGG13, num_classes)


def _convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A convolution that keeps height and width, normalised. Its bias is the original's."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels, eps=1e-3),
        nn.ReLU(inplace=True),
    ]
