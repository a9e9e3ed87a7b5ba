"""ResNet-50. Names and shapes of the parameters are torchvision's, so its weights can be loaded.

Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016; the strides are in the 3x3
convolutions, as nearly everyone has them since ("version 1.5").
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mpidl.models.checks import check_count, check_images, check_switch

_NUM_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


def resnet50(
    *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, zero_init_residual: bool = False
) -> nn.Module:
    """Make ResNet-50: 25,557,032 parameters for 1,000 classes."""
    return ResNet50(num_classes, in_channels, image_size, zero_init_residual)


class ResNet50(nn.Module):
    """Sixteen blocks of three convolutions in four layers, each with a shortcut around it.

    Args:
        num_classes: number of outputs.
        in_channels: the images' channels.
        image_size: the images' height and width, at least 32.
        zero_init_residual: whether every block begins as its shortcut alone, the last normalisation's scale at zero:
            large batches train better (Goyal and others, 2017, section 5.1).

    Raises:
        ConfigError: an argument is out of its range.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, num_classes: int, in_channels: int, image_size: int, zero_init_residual: bool) -> None:
        super().__init__()
        check_count("resnet50", "num_classes", num_classes)
        check_count("resnet50", "in_channels", in_channels)
        check_count("resnet50", "image_size", image_size, 32)
        check_switch("resnet50", "zero_init_residual", zero_init_residual)
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for number, count in enumerate(_NUM_BLOCKS):
            width, stride = 64 << number, 1 if number == 0 else 2
            blocks = [_Bottleneck(channels, width, stride)]
            channels = width * _EXPANSION
            blocks += [_Bottleneck(channels, width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, _Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: floating point, (batch, in_channels, image_size, image_size).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            DataError: the images are of another shape or type.
        """
        check_images("resnet50", images, self.image_shape)
        features = self.maxpool(functional.relu(self.bn1(self.conv1(images)), inplace=True))  # (batch, 64, 56, 56)
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))  # (batch, 2048, 7, 7)
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class _Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, added to what came in."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, 4 * width, height / stride, width / stride)."""
        hidden = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        hidden = functional.relu(self.bn2(self.conv2(hidden)), inplace=True)
        return functional.relu(self.bn3(self.conv3(hidden)) + self.downsample(features), inplace=True)
