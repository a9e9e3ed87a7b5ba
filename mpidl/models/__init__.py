"""Models by name: networks for the built-in data, larger ones to measure with, and `package.module:callable`.

Every built-in model has attributes `num_classes` and `image_shape` and checks the shape of its input.
"""

from __future__ import annotations

from mpidl.models.digits import DigitsCNN
from mpidl.models.fashion import FashionCNN
from mpidl.models.inception import InceptionV1
from mpidl.models.lenet import LeNet5
from mpidl.models.registry import NAMES, build
from mpidl.models.vgg import VGG13, VGG16

__all__ = ["NAMES", "VGG13", "VGG16", "DigitsCNN", "FashionCNN", "InceptionV1", "LeNet5", "build"]
