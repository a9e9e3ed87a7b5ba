"""CIFAR-10 from the files of its binary version, which are never downloaded.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009, section 3;
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpidl.data.arrays import check_labels
from mpidl.data.pixels import ImageSource
from mpidl.errors import ConfigError, DataError

NUM_CLASSES = 10
_TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST_FILES = ("test_batch.bin",)
_SHAPE = (3, 32, 32)
_SAMPLE_BYTES = 1 + 3 * 32 * 32  # the label, then all red, all green, all blue pixels

# Of the training set's pixels, from 0 to 1.
_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2470, 0.2435, 0.2616)
_SHIFT = 4

_ADVICE = (
    "unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html (the binary version) and give the "
    "folder of data_batch_1.bin to data_batch_5.bin and test_batch.bin with --data-dir"
)


def cifar10(data_dir: str | None = None, *, augment: bool = False) -> tuple[ImageSource, ImageSource]:
    """Read the 50,000 training and 10,000 test images.

    Args:
        data_dir: the folder of the six files, or the one above it.
        augment: whether training moves images by up to 4 pixels and mirrors half of them.

    Raises:
        ConfigError: no folder is given, or augment is neither true nor false.
        DataError: a file is missing, cut short, or has a label above 9.
    """
    if data_dir is None:
        raise ConfigError(f"CIFAR-10 needs its folder; {_ADVICE}")
    if not isinstance(augment, bool):
        raise ConfigError(f"cifar10: augment is {augment!r}; give true or false")
    folder = Path(data_dir)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder /= "cifar-10-batches-bin"
    missing = [name for name in (*_TRAIN_FILES, *_TEST_FILES) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}; {_ADVICE}")
    return _read(folder, _TRAIN_FILES, _SHIFT if augment else 0), _read(folder, _TEST_FILES, 0)


def _read(folder: Path, names: tuple[str, ...], shift: int) -> ImageSource:
    samples = np.concatenate([_samples(folder / name) for name in names])
    labels = samples[:, 0].astype(np.int64)
    pixels = np.ascontiguousarray(samples[:, 1:]).reshape(-1, *_SHAPE)
    return ImageSource(pixels, labels, _MEAN, _DEVIATION, shift)


def _samples(path: Path) -> npt.NDArray[np.uint8]:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not content.size or content.size % _SAMPLE_BYTES:
        raise DataError(
            f"{path} has {content.size} bytes, which is no multiple of a sample's {_SAMPLE_BYTES}; unpack it again"
        )
    samples = content.reshape(-1, _SAMPLE_BYTES)
    try:
        check_labels(samples[:, 0], NUM_CLASSES)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return samples
