"""VGG networks for small images, with batch normalisation and dropout, as BigDL builds them for CIFAR-10.

Source: VggForCifar10 in BigDL's models/vgg; Simonyan, Zisserman, ICLR 2015, configurations B, D and E.
"""

from __future__ import annotations

from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images, check_switch

_NUM_CONVOLUTIONS = {"vgg13_32": (2, 2, 2, 2, 2), "vgg16_32": (2, 2, 3, 3, 3), "vgg19_32": (2, 2, 4, 4, 4)}
_WIDTHS = (1, 2, 4, 8, 8)  # of the blocks, in units of the first one's channels


class _SmallVGG(nn.Module):
    """Blocks of convolutions, each ending in a pooling, and two linear layers.

    Args:
        num_classes: number of outputs.
        in_channels: the images' channels.
        image_size: the images' height and width; 32 and less come down to one point.
        width: channels of the first block; others have up to eight times as many, as has the hidden linear layer.
        batch_norm: whether convolutions and the hidden linear layer are normalised.
        dropout: whether training drops values between convolutions (0.3 and 0.4) and before linear layers (0.5).

    Raises:
        ConfigError: an argument is out of its range.
    """

    name: str

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 64,
        batch_norm: bool = True,
        dropout: bool = True,
    ) -> None:
        super().__init__()
        counts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "width": width}
        for argument, value in counts.items():
            check_count(self.name, argument, value)
        check_switch(self.name, "batch_norm", batch_norm)
        check_switch(self.name, "dropout", dropout)
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        layers: list[nn.Module] = []
        side = image_size
        for count, multiple in zip(_NUM_CONVOLUTIONS[self.name], _WIDTHS, strict=True):
            for index in range(count):
                layers += _convolution(in_channels, multiple * width, batch_norm)
                if dropout and index < count - 1:
                    layers.append(nn.Dropout(0.4 if len(layers) > 3 else 0.3))
                in_channels = multiple * width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            side = -(-side // 2)
        self.features = nn.Sequential(*layers, nn.Flatten())
        hidden = 8 * width
        self.classifier = nn.Sequential(
            nn.Dropout(0.5 if dropout else 0.0),
            nn.Linear(in_channels * side**2, hidden),
            nn.BatchNorm1d(hidden) if batch_norm else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5 if dropout else 0.0),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, image_size, image_size); at least two while training, for the
                last normalisation.

        Returns:
            Logits, (batch, num_classes). BigDL's original ends in a LogSoftMax.

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images(self.name, images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits


class VGG13(_SmallVGG):
    """Ten convolutions and two linear layers; 9,679,690 parameters for ten classes. Arguments: see `_SmallVGG`."""

    name = "vgg13_32"


class VGG16(_SmallVGG):
    """BigDL's VGG-16 for CIFAR-10: 13 convolutions; 14,991,946 parameters for ten classes."""

    name = "vgg16_32"


class VGG19(_SmallVGG):
    """The same with 16 convolutions; 20,304,202 parameters for ten classes."""

    name = "vgg19_32"


def _convolution(in_channels: int, out_channels: int, batch_norm: bool) -> list[nn.Module]:
    """A convolution that keeps height and width, normalised. Its bias is the original's."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    if not batch_norm:
        # Ten and more layers that are not normalised pass no signal on with torch's own initial weights.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        return [convolution, nn.ReLU(inplace=True)]
    return [convolution, nn.BatchNorm2d(out_channels, eps=1e-3), nn.ReLU(inplace=True)]
