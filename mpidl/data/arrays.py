"""Arrays as a source of samples, in memory or mapped from files larger than it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from mpidl.data import memory
from mpidl.data.files import AnyArray
from mpidl.data.order import Int64Array
from mpidl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_SIZE = 1 << 20  # labels looked at together


class ArraySource:
    """Samples that are the rows of one or more arrays of equal length; a batch is a tuple of tensors.

    The arrays may be memory-mapped and larger than memory: a batch copies its own rows, in the order in which
    they lie in the file, and touches nothing else.

    Attributes:
        targets: the last array, where there is more than one.
    """

    needs_seeds = False

    def __init__(self, arrays: Sequence[AnyArray | Tensor]) -> None:
        """Look at the arrays without reading them.

        Args:
            arrays: of any number type that torch knows, each (samples, ...); not copied.

        Raises:
            DataError: no array, no samples, or arrays of different lengths, of other types, or not on the CPU.
        """
        if not arrays:
            raise DataError("a data set of arrays needs at least one array; give (inputs, targets)")
        self._columns = [_Column(array, f"array {number}") for number, array in enumerate(arrays)]
        lengths = [len(column) for column in self._columns]
        if len(set(lengths)) > 1:
            raise DataError(f"the arrays have {' and '.join(map(str, lengths))} samples; they must be equal")
        if not lengths[0]:
            raise DataError("the data set is empty; it needs at least one sample")
        self.targets: AnyArray | None = self._columns[-1].array if len(arrays) > 1 else None

    def __len__(self) -> int:
        return len(self._columns[0])

    def read(self, indices: Int64Array, seeds: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Copy the rows at `indices` into one tensor per array; seeds have no effect."""
        return tuple(column.rows(indices) for column in self._columns)


def is_array(value: object) -> TypeGuard[AnyArray | Tensor]:
    """Tell whether the value is a NumPy array or a torch tensor."""
    from torch import Tensor

    return isinstance(value, np.ndarray | Tensor)


def check_labels(
    source_or_targets: object, num_classes: int, advice: str = "correct the labels or the number of classes"
) -> None:
    """See that whole-number targets lie in [0, num_classes), a chunk at a time (they may be memory-mapped).

    Args:
        source_or_targets: an array or tensor of labels, or a Source. A Source without an attribute `targets`
            (a Dataset's, whose targets show only when they are read) and targets that are not whole numbers
            are not looked at.
        num_classes: the number of classes.
        advice: what to do about a wrong one.

    Raises:
        DataError: a label is out of range; names the first such sample and the label.
    """
    targets = source_or_targets if is_array(source_or_targets) else getattr(source_or_targets, "targets", None)
    if targets is None:
        return
    labels = _Column(targets, "the labels").array
    if labels.dtype.kind not in "iu" or not labels.size:
        return
    rows = max(1, _CHUNK_SIZE * len(labels) // labels.size)
    for start in range(0, len(labels), rows):
        chunk = labels[start : start + rows]
        wrong = (chunk < 0) | (chunk >= num_classes)
        if wrong.any():
            first = tuple(int(place[0]) for place in np.nonzero(wrong))
            raise DataError(
                f"sample {start + first[0]} has label {chunk[first]}; with {num_classes} classes labels go from 0 "
                f"to {num_classes - 1}; {advice}"
            )


class _Column:
    """One array of a data set and how its rows become a tensor."""

    def __init__(self, array: AnyArray | Tensor, name: str) -> None:
        import torch

        self._view: Callable[[Tensor], Tensor] = lambda rows: rows
        if isinstance(array, torch.Tensor):
            array = self._from_tensor(array, name)
        if not array.ndim:
            raise DataError(f"{name} is a single number; it needs a first dimension, the samples")
        self._is_mapped = _is_mapped(array)
        self._native = array.dtype.newbyteorder("=")
        try:
            torch.from_numpy(np.empty(0, self._native))
        except TypeError:
            raise DataError(
                f"{name} is of type {array.dtype}, which torch has no tensor for; give numbers or booleans"
            ) from None
        self.array: AnyArray = array.view(np.ndarray)
        # `take` copies whole rows, fancy indexing goes element by element; but it would first copy an array
        # that is not laid out plainly as a whole.
        self._is_plain = array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, indices: Int64Array) -> Tensor:
        """Copy rows into a new tensor. NumPy does it, in this thread only; torch would start more of them."""
        import torch

        rows = memory.empty((len(indices), *self.array.shape[1:]), self._native)
        if self._is_mapped:
            order = np.argsort(indices)
            rows[order] = self._copy(indices[order])
        elif self._is_plain:
            self.array.take(indices, axis=0, out=rows, mode="clip")  # "raise" would fill a copy of `rows` first
        else:
            rows[...] = self._copy(indices)
        return self._view(torch.from_numpy(rows))

    def _copy(self, indices: Int64Array) -> AnyArray:
        copied: AnyArray = self.array.take(indices, axis=0) if self._is_plain else self.array[indices]
        return copied

    def _from_tensor(self, tensor: Tensor, name: str) -> AnyArray:
        import torch

        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise DataError(f"{name} is a {tensor.layout} tensor on {tensor.device}; give dense CPU tensors")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            self._view = lambda rows: rows.view(torch.bfloat16)
            tensor = tensor.view(torch.int16)
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise DataError(f"{name} is a tensor of {tensor.dtype}, which cannot be indexed: {error}") from None


def _is_mapped(array: AnyArray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False
