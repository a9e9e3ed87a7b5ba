"""LeNet-5, as it is usually built today."""

from __future__ import annotations

from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images


class LeNet5(nn.Module):
    """LeNet-5 for 28x28 images; 61,706 parameters for ten classes and one channel.

    The layers' sizes are the original's, with all maps of the first convolution connected to the second. ReLU,
    maximum pooling and a linear last layer stand where the original has tanh, trained averages and radial
    basis functions: it trains faster and better.

    Args:
        num_classes: number of outputs.
        in_channels: the images' channels.

    Raises:
        ConfigError: an argument is not a positive integer.

    Source: LeCun, Bottou, Bengio, Haffner, Proceedings of the IEEE 86 (1998), section II.B.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        check_count("lenet5", "num_classes", num_classes)
        check_count("lenet5", "in_channels", in_channels)
        self.num_classes = num_classes
        self.image_shape = (in_channels, 28, 28)
        self.features = nn.Sequential(
            # The padding makes 32x32, the size that LeNet-5 was built for, of 28x28.
            nn.Conv2d(in_channels, 6, 5, padding=2),  # (batch, 6, 28, 28)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (batch, 6, 14, 14)
            nn.Conv2d(6, 16, 5),  # (batch, 16, 10, 10)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (batch, 16, 5, 5)
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, 28, 28).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("lenet5", images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits
