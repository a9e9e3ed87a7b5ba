"""Folders of images, one folder for each class, decoded with Pillow when they are read.

    DATA_DIR/train/CLASS/*.jpg      classes are numbered in the order of their names
    DATA_DIR/val/CLASS/*.jpg        need not be there

Training takes a random part of each image and mirrors half of them; validation takes the middle. What is drawn follows
from a sample's seed, so from (seed, epoch, sample), and not from who reads it: let `loader_workers` processes do so.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpidl.data import memory
from mpidl.data.files import DEFLATE_RATIO
from mpidl.data.order import Int64Array
from mpidl.data.pixels import scale_and_shift
from mpidl.data.sources import SampleError
from mpidl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"))

# Of ImageNet's training set, as nearly everyone has them; for grey images their mean.
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)

_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)  # of the random part: Szegedy and others, CVPR 2015, section 6
_NUM_TRIES = 10
_DEEP_MODES = ("I", "F")  # 16 and 32 bits: Pillow cuts what is above 255
_USUAL_PIXELS = 1 << 24  # of which nothing is asked; of more, a byte holds at most eight that are deflated
_MOST_STAND_INS = 100  # damaged images in a row


class DamagedImageError(Exception):
    """An image that cannot be decoded."""


class ImageFolderSource:
    """Images in files, of any sizes; a batch is (images, labels): float32, (batch, channels, size, size); int64.

    Attributes:
        targets: int64, (samples,); the numbers of the samples' classes.
        classes: their names.
        num_skipped: images that could not be decoded and for which others stood in, in this process.
    """

    needs_seeds = True  # which also has worker processes read it

    def __init__(
        self, root: Path, classes: Sequence[str], *, size: int, resize: int, augment: bool, grey: bool, convert: bool,
        skip_damaged: bool,
    ) -> None:  # fmt: skip
        """List the files, without opening them.

        Args:
            root: the folder of the classes' folders.
            classes: the names of all classes, in the order of their numbers.
            size: height and width of the samples.
            resize: length of an image's shorter side before its middle is taken.
            augment: whether to take random parts and mirror.
            grey: whether images have one channel.
            convert: whether images of another kind, such as grey ones among coloured ones, are converted.
            skip_damaged: whether the next image that can be decoded stands in for one that cannot.

        Raises:
            DataError: there is a folder of an unknown class, or one without images.
        """
        self.classes = tuple(classes)
        self.num_skipped = 0
        self._root = str(root)
        self._size, self._resize, self._augment = size, resize, augment
        self._mode, self._convert, self._skip_damaged = "L" if grey else "RGB", convert, skip_damaged
        mean, deviation = ([float(np.mean(values))] if grey else values for values in (_MEAN, _DEVIATION))
        self._scale, self._shift = scale_and_shift(mean, deviation)
        self._names, self.targets = _list_images(root, self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, indices: Int64Array, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Decode, cut and normalise the images at `indices`.

        Raises:
            SampleError: an image cannot be read, cannot be decoded, or is of another kind than the others.
        """
        import torch

        channels = 1 if self._mode == "L" else 3
        pixels = np.empty((len(indices), self._size, self._size, channels), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for position, index in enumerate(indices.tolist()):
            seed = None if seeds is None else seeds[position]
            pixels[position], labels[position] = self._sample(index, seed)
        images = memory.copy(pixels.transpose(0, 3, 1, 2), np.float32)
        images *= self._scale
        images += self._shift
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _sample(self, index: int, seed: int | None) -> tuple[npt.NDArray[np.uint8], int]:
        """The pixels, (size, size, channels), and the label of a sample, or of the one that stands in for it."""
        for step in range(min(len(self), _MOST_STAND_INS)):
            number = (index + step) % len(self)
            name = f"{self._root}/{self._names[number]}"
            try:
                image = self._cut(_decode(name), name, index, seed)
                return np.asarray(image).reshape(self._size, self._size, -1), int(self.targets[number])
            except DamagedImageError as error:
                if not self._skip_damaged:
                    raise SampleError(
                        f"{name} cannot be decoded: {error}; repair or remove it, or let others stand in for such "
                        "images with data_args = {skip_damaged = true}",
                        index,
                    ) from error
                self.num_skipped += 1
                print(
                    f"mpidl: skipped {name}, which cannot be decoded ({error}); {self.num_skipped} so far in process "
                    f"{os.getpid()}",
                    file=sys.stderr,
                )
            except OSError as error:
                raise SampleError(f"{name} cannot be read: {error}", index) from error
        raise SampleError(f"{_MOST_STAND_INS} images from {self._names[index]} on cannot be decoded", index)

    def _cut(self, image: Image, name: str, index: int, seed: int | None) -> Image:
        if image.mode != self._mode:
            if image.mode.startswith(_DEEP_MODES):
                raise SampleError(
                    f"{name} is of Pillow's mode {image.mode}, with more than 8 bits a channel, of which converting "
                    "would keep the darkest only; save it with 8, or remove it",
                    index,
                )
            if not self._convert:
                raise SampleError(
                    f"{name} is of Pillow's mode {image.mode}, and all are to be of mode {self._mode}; convert such "
                    "images with data_args = {convert = true}, or remove it",
                    index,
                )
            image = image.convert(self._mode)
        if self._augment and seed is not None:
            return _random_part(image, self._size, random.Random(seed))
        return _middle(image, self._size, self._resize)


def images(
    data_dir: str | None = None, *, size: int = 224, resize: int | None = None, augment: bool = True,
    grey: bool = False, convert: bool = False, skip_damaged: bool = False,
) -> tuple[ImageFolderSource, ImageFolderSource | None]:  # fmt: skip
    """Find the images of a training set and, if it is there, a validation set.

    Args:
        data_dir: a folder with the folders train and val, which have a folder for each class.
        size: height and width of the samples.
        resize: length of an image's shorter side before validation takes its middle; by default 8/7 of size.
        augment: whether training takes random parts and mirrors; otherwise it takes the middle too.
        grey: whether images have one channel.
        convert: whether images of another kind are converted: grey ones among coloured ones, or with transparency.
        skip_damaged: whether the next image stands in for one that cannot be decoded, which is said and counted.

    Raises:
        ConfigError: Pillow or data_dir is missing, or an argument is out of its range.
        DataError: folders are missing or empty, or the sets' classes differ.
    """
    switches = {"augment": augment, "grey": grey, "convert": convert, "skip_damaged": skip_damaged}
    resize = round(size * 8 / 7) if resize is None and type(size) is int else resize
    _check(size, resize, switches)
    assert resize is not None
    if data_dir is None:
        raise ConfigError("images needs the folder that has the folders train and val; give it with --data-dir")
    folders = [Path(data_dir, name) for name in ("train", "val")]
    if not folders[0].is_dir():
        raise DataError(f"{folders[0]} does not exist; put the training images into {folders[0]}/CLASS/")
    classes = sorted(path.name for path in folders[0].iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{folders[0]} has no folders; put the images of each class into one, {folders[0]}/CLASS/")
    train, validation = (
        ImageFolderSource(
            folder, classes, size=size, resize=resize, augment=augment and folder is folders[0], grey=grey,
            convert=convert, skip_damaged=skip_damaged,
        )
        if folder.is_dir() else None
        for folder in folders
    )  # fmt: skip
    assert train is not None
    return train, validation


def _check(size: object, resize: object, switches: dict[str, bool]) -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError("images are decoded with Pillow, which is not installed: pip install pillow") from None
    if type(size) is not int or size < 1:
        raise ConfigError(f"images: size is {size!r}; give an integer of at least 1")
    if type(resize) is not int or resize < size:
        raise ConfigError(f"images: resize is {resize!r}; give an integer of at least size, {size}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"images: {name} is {value!r}; give true or false")


def _list_images(root: Path, classes: tuple[str, ...]) -> tuple[list[str], Int64Array]:
    """The images' paths below the root, class by class in the order of their names, and their labels."""
    unknown = sorted({path.name for path in root.iterdir() if path.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{root} has the folder {unknown[0]}, a class that the training set does not have; remove it")
    names: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        folder = root / name
        files = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if not files and folder.is_dir():
            raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); put some there or remove it")
        names += [f"{name}/{file}" for file in files]
        labels += [number] * len(files)
    if not names:
        raise DataError(f"{root} has no folders; put the images of each class into one, or remove {root}")
    return names, np.array(labels, np.int64)


def _decode(name: str) -> Image:
    """The decoded image.

    Raises:
        OSError: the file cannot be opened.
        DamagedImageError: what it holds cannot be decoded.
    """
    import PIL.Image

    with open(name, "rb") as file:
        try:
            image = PIL.Image.open(file)
            if image.width * image.height > _USUAL_PIXELS + 8 * DEFLATE_RATIO * os.fstat(file.fileno()).st_size:
                raise ValueError(f"its header states {image.width} x {image.height} pixels, more than it can hold")
            image.load()
            return image
        except Exception as error:  # Pillow's decoders raise whatever they meet
            raise DamagedImageError(f"{type(error).__name__}: {error}") from error


def _random_part(image: Image, size: int, generator: random.Random) -> Image:
    """A part of random size, shape and place, scaled to (size, size), and mirrored half of the time."""
    from PIL.Image import Resampling, Transpose

    width, height = image.size
    box: tuple[int, int, int, int] | None = None
    for _ in range(_NUM_TRIES):
        area = width * height * generator.uniform(*_AREAS)
        ratio = math.exp(generator.uniform(*(math.log(bound) for bound in _RATIOS)))
        part = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= part[0] <= width and 1 <= part[1] <= height:
            left, top = generator.randint(0, width - part[0]), generator.randint(0, height - part[1])
            box = left, top, left + part[0], top + part[1]
            break
    is_mirrored = generator.random() < 0.5
    if box is None:  # of a very long image
        return _middle(image, size, size)
    image = image.resize((size, size), Resampling.BILINEAR, box=box)
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if is_mirrored else image


def _middle(image: Image, size: int, resize: int) -> Image:
    """The middle, (size, size), of the image scaled so that its shorter side has `resize` pixels."""
    from PIL.Image import Resampling

    width, height = image.size
    side = min(width, height) * size / resize  # of the middle, in the image's own pixels
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + side, top + side))
