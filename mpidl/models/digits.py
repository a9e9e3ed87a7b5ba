"""A small convolutional network for the 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images, check_share


class DigitsCNN(nn.Module):
    """Two convolutions, a pooling and two linear layers; 38,282 parameters for ten classes.

    Args:
        num_classes: number of outputs.
        dropout: share of the hidden layer's values that training drops.

    Raises:
        ConfigError: an argument is out of its range.
    """

    image_shape = (1, 8, 8)

    def __init__(self, *, num_classes: int = 10, dropout: float = 0.25) -> None:
        super().__init__()
        check_count("digits_cnn", "num_classes", num_classes)
        check_share("digits_cnn", "dropout", dropout)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),  # (batch, 16, 8, 8)
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),  # (batch, 32, 8, 8)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (batch, 32, 4, 4)
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, 1, 8, 8).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("digits_cnn", images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits
