"""Sources: arrays, files and Datasets, and what wrong ones get."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from mpidl.data import ArraySource, DatasetSource, ReadError, Source, as_source, check_labels, sample_seed
from mpidl.data.order import kept_random_state
from mpidl.data.pipe import Frame, decode, encode, read_frame, write_frame
from mpidl.data.pixels import ImageSource
from mpidl.data.synthetic import SyntheticSource
from mpidl.errors import DataError

X = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
Y = np.arange(10)
INDICES = np.array([7, 0, 7, 3])


class Noisy(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Each sample draws from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return index + torch.rand(3), {"label": index, "noise": np.random.rand(2), "more": random.random()}


class Lengthless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Streaming(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def through_a_pipe(frame: Frame) -> Frame:
    """What the other end reads; a small frame, that fits into a pipe."""
    reading, writing = (io.FileIO(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
    with reading, writing:
        write_frame(writing, frame)
        return read_frame(reading)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "?", "c8", ">f4", ">i2"])
def test_rows_become_tensors_of_the_same_type(dtype: str) -> None:
    array = X.astype(dtype)
    (rows,) = ArraySource([array]).read(INDICES)
    assert np.array_equal(rows.numpy(), array[INDICES])
    assert rows.numpy().dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64, torch.bool])
def test_tensors_are_read_like_arrays(dtype: torch.dtype) -> None:
    tensor = torch.arange(20).reshape(10, 2).to(dtype).requires_grad_(dtype.is_floating_point)
    (rows,) = ArraySource([tensor]).read(INDICES)
    assert rows.dtype == dtype
    assert not rows.requires_grad
    assert torch.equal(rows, tensor.detach()[INDICES])


def narrow_sources(folder: Path) -> dict[str, Source]:
    """Samples of odd lengths, so that only memory that is made for it lies where matrix products want it."""
    inputs = np.random.default_rng(0).random((50, 3, 3), np.float32)
    np.save(folder / "x.npy", inputs)
    pixels = (inputs * 255).astype(np.uint8)
    return {
        "array": ArraySource([inputs]),
        "strided": ArraySource([inputs[::-1]]),
        "mapped": ArraySource([np.load(folder / "x.npy", mmap_mode="r")]),
        "pixels": ImageSource(pixels, np.zeros(50, np.int64), 0.5, 0.5),
        "synthetic": SyntheticSource((3, 3), 2, 50, seed=0),
        "Dataset": DatasetSource(TensorDataset(torch.from_numpy(inputs))),
    }


@pytest.mark.parametrize("name", ["array", "strided", "mapped", "pixels", "synthetic", "Dataset"])
@pytest.mark.parametrize("travels", [False, True], ids=["here", "from a worker"])
def test_batches_lie_where_torch_would_put_them_so_that_products_have_the_same_bits(
    name: str, travels: bool, tmp_path: Path
) -> None:
    source, kept = narrow_sources(tmp_path)[name], []
    for size in range(1, 30):
        batch = source.read(np.arange(size), list(range(size)))
        if travels:
            batch = decode(through_a_pipe(encode(batch)))
        kept.append(batch)  # so that the next one lies elsewhere
    assert all(inputs.data_ptr() % 64 == 0 for inputs, *_ in kept)


@pytest.mark.parametrize("view", [X[::2], X[::-1], X.transpose(2, 0, 1), np.asfortranarray(X)], ids=range(4))
def test_arrays_of_any_layout_are_read(view: npt.NDArray[Any]) -> None:
    indices = np.array([2, 0, 1])
    (rows,) = ArraySource([view]).read(indices)
    assert np.array_equal(rows.numpy(), view[indices])


def test_a_tuple_of_arrays_gives_batches_of_inputs_and_targets() -> None:
    source = as_source((X, torch.from_numpy(Y)))
    inputs, targets = source.read(INDICES, None)
    assert len(source) == 10
    assert isinstance(source, Source)
    assert not source.needs_seeds
    assert np.array_equal(inputs, X[INDICES])
    assert targets.tolist() == INDICES.tolist()
    assert as_source(source) is source


def test_a_tensor_dataset_is_read_as_its_arrays() -> None:
    source = as_source(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)))
    assert isinstance(source, ArraySource)
    assert source.read(INDICES)[1].tolist() == INDICES.tolist()


@given(indices=st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_mapped_files_give_rows_in_the_order_asked_for(indices: list[int], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / "rows-x.npy", folder / "rows-y.npy"]
    for path, array in zip(paths, (X.astype(">f4"), Y), strict=True):
        if not path.exists():
            np.save(path, array)
    inputs, targets = as_source([str(path) for path in paths]).read(np.array(indices), None)
    assert np.array_equal(inputs, X[indices])
    assert targets.tolist() == indices


@pytest.mark.parametrize("fortran_order", [False, True])
def test_a_mapped_file_larger_than_memory_is_read_without_touching_the_rest(
    tmp_path: Path, fortran_order: bool
) -> None:
    num_rows = 2**38
    shape = (num_rows, 2)  # 512 GiB, of which the file system keeps what was written
    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, "w+", np.uint8, shape, fortran_order=fortran_order)
    large[-1, 1] = 9
    large.flush()
    del large
    source = as_source((str(path),))
    (rows,) = source.read(np.array([num_rows - 1, 0]), None)
    assert rows.tolist() == [[0, 9], [0, 0]]
    assert path.stat().st_blocks * 512 < 2**24


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("first", "second"), ("x", "y", "more")])
def test_an_npz_file_gives_inputs_and_targets(tmp_path: Path, names: tuple[str, ...]) -> None:
    named: dict[str, Any] = dict(zip(names, (X, Y, Y), strict=False))
    np.savez_compressed(tmp_path / "a.npz", **named)
    inputs, targets = as_source(tmp_path / "a.npz").read(INDICES, None)
    assert np.array_equal(inputs, X[INDICES])
    assert targets.tolist() == INDICES.tolist()


def test_a_sample_s_augmentation_depends_on_its_seed_alone() -> None:
    source = as_source(Noisy())
    assert source.needs_seeds
    seeds = [sample_seed(1, 2, index) for index in INDICES.tolist()]
    with kept_random_state():
        images, others = source.read(INDICES, seeds)
        torch.rand(5)
        alone_images, alone_others = source.read(INDICES[3:], seeds[3:])
    assert torch.equal(images[3:], alone_images)
    assert all(torch.equal(others[name][3:], alone_others[name]) for name in others)
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0] % 1, images[1] % 1)


def test_a_failing_sample_is_named() -> None:
    class Failing(Noisy):
        def __getitem__(self, index: int) -> Any:
            raise KeyError(index)

    with pytest.raises(ReadError, match=r"dataset\[7\] of 10 failed(.|\n)*KeyError: 7") as caught:
        as_source(Failing()).read(INDICES, None)
    assert caught.value.index == 7


def test_samples_of_different_shapes_are_refused_with_advice() -> None:
    class Ragged(Noisy):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index)

    with pytest.raises(ReadError, match="same structure"):
        as_source(Ragged()).read(INDICES, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:9]), "10 and 9 samples"),
        ((X[:0], Y[:0]), "empty"),
        ((), "at least one array"),
        ((X, [1, 2]), "tuple of ndarray, list"),
        ((X, np.array(3)), "single number"),
        ((X, np.array([None] * 10)), "type object"),
        ((X, np.array(["a"] * 10)), "no tensor for"),
        ((X, torch.zeros(10, device="meta")), "on meta"),
        ((X, torch.eye(10).to_sparse()), "sparse"),
        (X, "single ndarray"),
        ({"x": X}, "single dict"),
        (Streaming(), "map-style"),
        (Lengthless(), "no length"),
        (iter([1, 2]), "read by index"),
        (3, "int is not a data set"),
        (TensorDataset(torch.zeros(0, 2)), "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_data_set_is_refused(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_source(data)


def test_an_empty_dataset_is_refused() -> None:
    class Empty(Noisy):
        def __len__(self) -> int:
            return 0

    with pytest.raises(DataError, match="empty"):
        DatasetSource(Empty())


@pytest.mark.parametrize("damage", ["missing", "folder", "truncated", "text", "nothing", "objects", "header only"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, damage: str, kind: str) -> None:
    path = tmp_path / f"damaged.{kind}"
    values: Any = np.array([{}, {}]) if damage == "objects" else np.arange(1000)
    if kind == "npy":
        np.save(path, values)
    else:
        np.savez_compressed(path, x=values, y=values)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "header only":
        path.write_bytes(content[:60])
    elif damage in ("text", "nothing"):
        path.write_text("no arrays here" if damage == "text" else "")
    elif damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(DataError, match=f"damaged.{kind}"):
        as_source(path if kind == "npz" else (path, path))


def test_an_npz_file_s_bytes_are_checked_at_every_place(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=X, y=Y)
    content = (tmp_path / "whole.npz").read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"cut\.npz"):
            as_source(tmp_path / "cut.npz")


def test_an_npz_header_that_states_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        for name in "xy":
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f8", "fortran_order": False, "shape": (2**50,)}
                np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="should hold 9007199254740992 bytes"):
        as_source(tmp_path / "bomb.npz")


def test_an_npz_file_of_other_arrays_is_refused_with_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "three.npz", a=X, b=Y, c=Y)
    with pytest.raises(DataError, match="a, b, c"):
        as_source(tmp_path / "three.npz")


@pytest.mark.parametrize("wrong", [-1, 10, 200])
@pytest.mark.parametrize("position", [0, 1_500_000, 1_999_999])
def test_the_first_label_out_of_range_is_named(wrong: int, position: int) -> None:
    labels = np.zeros(2_000_000, np.int16)
    labels[position:] = wrong
    for targets in (labels, ArraySource([labels, labels]), torch.from_numpy(labels)):
        with pytest.raises(DataError, match=f"sample {position} has label {wrong};.* 0 to 9"):
            check_labels(targets, 10)


def test_labels_of_every_pixel_are_checked_too() -> None:
    masks = np.zeros((5, 4, 4), np.uint8)
    check_labels(masks, 3)
    masks[3, 1, 2] = 3
    with pytest.raises(DataError, match="sample 3 has label 3"):
        check_labels(masks, 3)


def test_targets_that_are_not_labels_are_not_looked_at() -> None:
    check_labels(np.full(5, 99.0), 10)
    check_labels(as_source(Noisy()), 10)
    check_labels(ArraySource([np.full(5, 99)]), 10)
