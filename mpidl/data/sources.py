"""Where samples come from: arrays, files, or any map-style Dataset, behind one `Source`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from mpidl.data.arrays import ArraySource, is_array
from mpidl.data.files import open_npy, open_npz
from mpidl.data.order import Int64Array, seed_everything
from mpidl.errors import DataError, MpidlError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Batch: TypeAlias = Any  # (inputs, targets), or the items' own structure of tuples, dicts and tensors


class ReadError(MpidlError):
    """A sample could not be read, or the process that reads samples died.

    Attributes:
        index: the sample's index, or None where no single sample is to blame.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, int | None]]:
        return type(self), (str(self), self.index)


class SampleError(ReadError, DataError):
    """A sample that is damaged or of another kind than the others: its file is to blame, and the message is enough."""


@runtime_checkable
class Source(Protocol):
    """A set of samples that can be read in batches by index.

    Attributes:
        needs_seeds: whether reading draws random numbers (augmentation) from process-wide generators.
    """

    needs_seeds: bool

    def __len__(self) -> int: ...

    def read(self, indices: Int64Array, seeds: Sequence[int] | None) -> Batch:
        """Read the samples at `indices`, in that order, as one batch.

        Args:
            indices: int64, (batch,), each in [0, len(self)).
            seeds: one 64-bit seed per index, or None to leave the random generators alone.

        Raises:
            ReadError: a sample could not be read.
        """
        ...


class DatasetSource:
    """The samples of a map-style Dataset, collated as torch's DataLoader does."""

    needs_seeds = True

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Keep the Dataset.

        Raises:
            DataError: it has no length, no samples, or cannot be indexed.
        """
        self.dataset = dataset
        self._length = _dataset_length(dataset)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Int64Array, seeds: Sequence[int] | None) -> Batch:
        """Read dataset[i] for each index, right after `seed_everything(seed)`, and collate the items.

        The process-wide random generators are left where the last sample put them.
        """
        items = []
        for position, index in enumerate(indices.tolist()):
            if seeds is not None:
                seed_everything(seeds[position])
            try:
                items.append(self.dataset[index])
            except Exception as error:
                raise ReadError(f"dataset[{index}] of {len(self)} failed\n{_text_of(error)}", index) from error
        try:
            return collate(items)
        except Exception as error:
            raise ReadError(
                f"samples {indices.tolist()[:8]}... do not make a batch; every sample needs the same structure "
                f"and shapes, of tensors, arrays, numbers, tuples or dicts\n{_text_of(error)}"
            ) from error


def collate(items: list[Any]) -> Batch:
    """Stack items into one batch: torch.utils.data.default_collate."""
    from torch.utils.data import default_collate

    return default_collate(items)


def as_source(data: object) -> Source:
    """Make a Source of what the user has.

    Args:
        data: a Source; a map-style Dataset; a tuple or list of arrays or tensors of equal length (memory-mapped
            ones too); the path of an .npz file of inputs and targets; or a pair of paths of .npy files, which
            are memory-mapped.

    Raises:
        DataError: none of these, or one that is missing, cut short, empty or of unequal lengths.
    """
    from torch.utils.data import IterableDataset, TensorDataset

    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        return ArraySource(open_npz(Path(data)))
    if type(data) is TensorDataset:
        return ArraySource(data.tensors)
    if isinstance(data, tuple | list):
        if data and all(isinstance(part, str | os.PathLike) for part in data):
            return ArraySource([open_npy(Path(part)) for part in data])
        if all(is_array(part) for part in data):
            return ArraySource(data)
        raise DataError(
            f"a {type(data).__name__} of {', '.join(type(part).__name__ for part in data[:4])} is not a data set; "
            "give arrays or tensors, (inputs, targets), or a map-style Dataset"
        )
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise DataError(
            f"{type(data).__name__} is not a data set that can be read by index; give a map-style Dataset "
            "(with __len__ and __getitem__), a tuple of arrays, or the path of an .npz file"
        )
    if is_array(data) or isinstance(data, dict):
        raise DataError(f"a single {type(data).__name__} is not a data set; give a tuple, (inputs, targets)")
    return DatasetSource(data)  # type: ignore[arg-type]  # any object with a length and an index


def _dataset_length(dataset: Dataset[Any]) -> int:
    try:
        length = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare it
    except (TypeError, NotImplementedError) as error:
        raise DataError(
            f"{type(dataset).__name__} has no length ({error}); a map-style Dataset needs __len__ and __getitem__"
        ) from None
    if length < 1:
        raise DataError(f"{type(dataset).__name__} is empty; it needs at least one sample")
    return length


def _text_of(error: Exception) -> str:
    """The traceback as text: it must survive a trip between processes."""
    return "".join(traceback.format_exception(error)).rstrip()
