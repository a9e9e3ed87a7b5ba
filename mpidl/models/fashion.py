"""A small convolutional network for Fashion-MNIST."""

from __future__ import annotations

from torch import Tensor, nn

from mpidl.models.checks import check_count, check_images, check_share


class FashionCNN(nn.Module):
    """Three convolutions with batch normalisation and one linear layer; 29,178 parameters for ten classes.

    Args:
        num_classes: number of outputs.
        dropout: share of the last layer's inputs that training drops.

    Raises:
        ConfigError: an argument is out of its range.
    """

    image_shape = (1, 28, 28)

    def __init__(self, *, num_classes: int = 10, dropout: float = 0.25) -> None:
        super().__init__()
        check_count("fashion_cnn", "num_classes", num_classes)
        check_share("fashion_cnn", "dropout", dropout)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            *_block(1, 16),  # (batch, 16, 14, 14)
            *_block(16, 32),  # (batch, 32, 7, 7)
            *_block(32, 64),  # (batch, 64, 3, 3)
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(64 * 3 * 3, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, 1, 28, 28).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("fashion_cnn", images, self.image_shape)
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A convolution that keeps height and width, normalised, then pooled to half of them."""
    return [
        # No bias: the normalisation that follows would take it away again.
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
