"""Models by name: small networks that fit the built-in data, and anyone's own as `package.module:callable`.

Every built-in model has a `num_classes` attribute and checks the shape of its input.
"""

from __future__ import annotations

from mpidl.models.digits import DigitsCNN
from mpidl.models.fashion import FashionCNN
from mpidl.models.lenet import LeNet5
from mpidl.models.registry import NAMES, build

__all__ = ["NAMES", "DigitsCNN", "FashionCNN", "LeNet5", "build"]
