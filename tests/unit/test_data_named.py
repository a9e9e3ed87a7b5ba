"""Data sets by name, the digits of the package, Fashion-MNIST, and objects by `package.module:name`."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpidl.data import NAMES, ImageSource, as_source, digits, load_named
from mpidl.data.fashion_mnist import DEBIAN_FOLDER
from mpidl.errors import ConfigError, DataError
from mpidl.imports import import_attribute, import_callable

MODULE = """
import numpy as np
x, y = np.zeros((4, 2)), np.arange(4)
def both(): return (x, y), (x[:2], y[:2])
def train_only(): return (x, y), None
def one(): return x, y
def with_folder(data_dir=None): return (x, y), data_dir
def nothing(): pass
class Nested:
    @staticmethod
    def make(): return x, y
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module beside the job: in the current directory, which is not on sys.path."""
    (tmp_path / "own_data.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "own_data"
    sys.modules.pop("own_data", None)


def write_fashion_mnist(folder: Path, num_images: int = 6, num_labels: int = 6, label: int = 9) -> None:
    for part in ("train", "t10k"):
        pixels = bytes(range(256)) * (num_images * 784 // 256 + 1)
        header = struct.pack(">4B3I", 0, 0, 8, 3, num_images, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels[: num_images * 784])
        labels = bytes([label] * num_labels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, num_labels) + labels)


def test_the_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", exc_type=ImportError)
    theirs = datasets.load_digits()
    ours = np.concatenate([part[0] for part in digits()])
    labels = np.concatenate([part[1] for part in digits()])
    assert np.array_equal(np.sort(labels), np.sort(theirs.target))
    found = {(image.tobytes(), label) for image, label in zip(ours, labels.tolist(), strict=True)}
    expected = {
        ((image / 16).astype(np.float32).tobytes(), label)
        for image, label in zip(theirs.images[:, np.newaxis], theirs.target.tolist(), strict=True)
    }
    assert found == expected


def test_the_digits_are_split_evenly_and_the_same_each_time() -> None:
    (train_x, train_y), (validation_x, validation_y) = load_named("digits")
    assert train_x.shape == (1437, 1, 8, 8)
    assert validation_x.shape == (360, 1, 8, 8)
    assert train_x.dtype == np.float32
    assert train_y.dtype == validation_y.dtype == np.int64
    assert train_x.min() == validation_x.min() == 0
    assert train_x.max() == validation_x.max() == 1
    held_out = np.bincount(validation_y, minlength=10)
    assert held_out.min() >= 34
    assert held_out.max() <= 37
    assert len({image.tobytes() for image in np.concatenate([train_x, validation_x])}) == 1797
    assert np.array_equal(load_named("digits")[1][1], validation_y)


def test_fashion_mnist_is_read_from_a_folder_and_normalised(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    train, validation = load_named("fashion_mnist", str(tmp_path))
    assert as_source(train) is train
    images, labels = validation.read(np.array([5, 0]))
    expected = (np.arange(784) % 256 / 255 - 0.2860) / 0.3530
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float32
    assert np.allclose(images[1].ravel(), expected, rtol=1e-6, atol=1e-6)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [9, 9]
    assert len(train) == 6


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_has_mean_0_and_deviation_1() -> None:
    train, validation = load_named("fashion_mnist")
    assert isinstance(train, ImageSource)
    assert (len(train), len(validation)) == (60_000, 10_000)
    images, _ = train.read(np.arange(0, 60_000, 20))
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01
    assert np.bincount(train.targets).tolist() == [6000] * 10


def test_a_missing_folder_says_what_installs_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.*`make data`.*dataset-fashion-mnist.*--data-dir"):
        load_named("fashion_mnist", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor .*\.gz"):
        load_named("fashion_mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("num_images", "num_labels", "label", "message"),
    [(6, 5, 9, "6 images.*5 labels"), (6, 6, 10, "labels-idx1-ubyte: sample 0 has label 10"), (0, 0, 1, "0 images")],
)
def test_fashion_mnist_files_that_do_not_fit_are_refused(
    tmp_path: Path, num_images: int, num_labels: int, label: int, message: str
) -> None:
    write_fashion_mnist(tmp_path, num_images, num_labels, label)
    with pytest.raises(DataError, match=message):
        load_named("fashion_mnist", str(tmp_path))


def test_images_and_labels_in_each_other_s_place_are_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    images, labels = (tmp_path / f"train-{name}-ubyte" for name in ("images-idx3", "labels-idx1"))
    images.write_bytes(labels.read_bytes())
    with pytest.raises(DataError, match=r"images are uint8, \(samples, 28, 28\)"):
        load_named("fashion_mnist", str(tmp_path))


@pytest.mark.parametrize("names", [("x", "y", "x_val", "y_val"), ("x_train", "y_train", "x_test", "y_test")])
def test_an_npz_file_may_hold_a_validation_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays = (np.zeros((4, 2)), np.arange(4), np.ones((2, 2)), np.arange(2))
    named: dict[str, Any] = dict(zip(names, arrays, strict=True))
    np.savez(tmp_path / "both.npz", **named)
    train, validation = load_named(str(tmp_path / "both.npz"))
    assert [len(as_source(part)) for part in (train, validation)] == [4, 2]
    with pytest.raises(DataError, match="load_named"):
        as_source(tmp_path / "both.npz")


def test_files_are_looked_for_in_the_data_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), y=np.arange(4))
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    np.save(tmp_path / "y.npy", np.arange(3))
    train, validation = load_named("a.npz", str(tmp_path))
    assert len(as_source(train)) == 4
    assert validation is None
    train, validation = load_named("x.npy,y.npy", str(tmp_path))
    assert len(as_source(train)) == 3
    assert validation is None
    with pytest.raises(ConfigError, match=r"names 1 \.npy files"):
        load_named("x.npy", str(tmp_path))


@pytest.mark.parametrize("name", ["digit", "fashion-mnist", "mnist", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=", ".join(NAMES)) as caught:
        load_named(name)
    if name in ("digit", "fashion-mnist"):
        assert "did you mean" in str(caught.value)


def test_a_callable_gives_one_data_set_or_two(own_module: str) -> None:
    train, validation = load_named(f"{own_module}:both")
    assert [len(as_source(part)) for part in (train, validation)] == [4, 2]
    assert load_named(f"{own_module}:train_only")[1] is None
    for name in ("one", "Nested.make"):
        train, validation = load_named(f"{own_module}:{name}")
        assert len(as_source(train)) == 4
        assert validation is None


def test_a_callable_gets_the_data_folder_if_it_takes_one(own_module: str) -> None:
    assert load_named(f"{own_module}:with_folder", "somewhere")[1] == "somewhere"
    with pytest.raises(ConfigError, match=r"takes no data_dir, but one was given, somewhere"):
        load_named(f"{own_module}:both", "somewhere")
    with pytest.raises(DataError, match="returned None"):
        load_named(f"{own_module}:nothing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", r"cannot import 'no_such_module' .* looked in the current directory"),
        ("own_broken:f", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_data:bth", "own_data has no 'bth'; did you mean 'both'"),
        ("own_data:Nested.mak", "own_data.Nested has no 'mak'; did you mean 'make'"),
        ("own_data:x", "is a ndarray, which cannot be called"),
        ("own_data.py:both", "without .py"),
        ("own_data:", "not of the form package.module:name"),
        (":both", "not of the form"),
        ("own data:both", "not of the form"),
    ],
)
def test_what_cannot_be_imported_or_called_is_named(own_module: str, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        import_callable(spec)
    assert re.match(r"^[^\n]+$", str(caught.value))


def test_an_attribute_is_imported_from_the_current_directory(own_module: str) -> None:
    assert import_attribute(f"{own_module}:y").tolist() == [0, 1, 2, 3]
    assert sys.path[0] == str(Path.cwd())
