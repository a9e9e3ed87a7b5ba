"""Models by name: networks for the built-in data, the large ones of the papers, and `package.module:callable`.

Every built-in model checks its input. Those of images have attributes `num_classes` and `image_shape`; those that
return a tuple while training, `auxiliary_weight` (see `mpidl.losses`).
"""

from __future__ import annotations

from mpidl.models.digits import DigitsCNN
from mpidl.models.fashion import FashionCNN
from mpidl.models.googlenet import googlenet, googlenet_bn, inception_v1
from mpidl.models.inception import inception_v3
from mpidl.models.lenet import LeNet5
from mpidl.models.registry import NAMES, build
from mpidl.models.resnet import resnet50
from mpidl.models.transformer import gpt
from mpidl.models.vgg import vgg16, vgg16_bn, vgg19, vgg19_bn
from mpidl.models.vgg_small import VGG13, VGG16, VGG19

lenet5, vgg13_32, vgg16_32, vgg19_32 = LeNet5, VGG13, VGG16, VGG19  # functions and classes alike, by their names

__all__ = [
    "NAMES",
    "VGG13",
    "VGG16",
    "VGG19",
    "DigitsCNN",
    "FashionCNN",
    "LeNet5",
    "build",
    "googlenet",
    "googlenet_bn",
    "gpt",
    "inception_v1",
    "inception_v3",
    "lenet5",
    "resnet50",
    "vgg13_32",
    "vgg16",
    "vgg16_32",
    "vgg16_bn",
    "vgg19",
    "vgg19_32",
    "vgg19_bn",
]
