"""Fashion-MNIST from its four idx files, as Debian's package dataset-fashion-mnist installs them.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms", 2017, https://github.com/zalandoresearch/fashion-mnist (MIT licence).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpidl.data.arrays import check_labels
from mpidl.data.idx import read_idx
from mpidl.data.pixels import ImageSource
from mpidl.errors import ConfigError, DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NUM_CLASSES = 10

# Of the training set's pixels, from 0 to 1.
_MEAN = 0.2860
_DEVIATION = 0.3530
_SHIFT = 2


def fashion_mnist(data_dir: str | Path | None = None, *, augment: bool = False) -> tuple[ImageSource, ImageSource]:
    """Read the 60,000 training and 10,000 test images.

    Args:
        data_dir: the folder of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each with or without .gz; by default where Debian's package puts them.
        augment: whether training moves images by up to 2 pixels and mirrors half of them.

    Raises:
        ConfigError: augment is neither true nor false.
        DataError: the folder or a file is missing or damaged, the numbers of images and labels differ, or a
            label is not in [0, 10).
    """
    if not isinstance(augment, bool):
        raise ConfigError(f"fashion_mnist: augment is {augment!r}; give true or false")
    folder = DEBIAN_FOLDER if data_dir is None else Path(data_dir)
    if not folder.is_dir():
        raise DataError(
            f"the folder {folder} with Fashion-MNIST does not exist; `make data` installs Debian's package "
            "dataset-fashion-mnist, or give the folder of its four idx files with --data-dir"
        )
    return _read_set(folder, "train", _SHIFT if augment else 0), _read_set(folder, "t10k", 0)


def _read_set(folder: Path, part: str, shift: int) -> ImageSource:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    pixels, labels = read_idx(images_path), read_idx(labels_path)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds {pixels.dtype} {pixels.shape}; images are uint8, (samples, 28, 28)")
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise DataError(f"{labels_path} holds {labels.dtype} {labels.shape}; labels are uint8, (samples,)")
    if len(pixels) != len(labels) or not len(labels):
        raise DataError(f"{images_path} holds {len(pixels)} images and {labels_path} {len(labels)} labels")
    try:
        check_labels(labels, NUM_CLASSES)
    except DataError as error:
        raise DataError(f"{labels_path}: {error}") from None
    return ImageSource(pixels, labels.astype(np.int64), _MEAN, _DEVIATION, shift)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} has neither {name} nor {name}.gz; `make data` installs all four files of Fashion-MNIST in "
        f"{DEBIAN_FOLDER}"
    )
