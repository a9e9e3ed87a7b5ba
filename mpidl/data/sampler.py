"""This rank's samples for a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import Sampler

from mpidl.data.order import permute
from mpidl.errors import DataError


class RankBatchSampler(Sampler[list[int]]):
    """Batches of this rank's sample indices: every sample once an epoch, and as many batches on every rank.

    Nothing is dropped and nothing is repeated: the last batches are smaller, and may differ by one sample between
    ranks, so pass `num_samples` to `ParameterManager.step` to have the exact mean.

    Example:
        ```python
        sampler = mpidl.RankBatchSampler(train_set, batch_size=32, seed=0)
        loader = torch.utils.data.DataLoader(train_set, batch_sampler=sampler)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for inputs, targets in loader: ...
        ```

    Args:
        data: the data set, or the number of its samples.
        batch_size: samples of a batch of one rank.
        seed: of the order; the same on all ranks.
        shuffle: whether every epoch has an order of its own.
        rank: default: this rank.
        size: default: the number of ranks.
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        if rank is None or size is None:
            from mpidl.runtime import init

            world = init()
            rank, size = world.rank if rank is None else rank, world.size if size is None else size
        self._num_samples = data if isinstance(data, int) else len(data)
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size} must be at least 1")
        if self._num_samples < size:
            raise DataError(f"{self._num_samples} samples for {size} ranks; every rank needs at least one")
        self._rank, self._size = rank, size
        self._global_batch = batch_size * size
        self._seed, self._shuffle = seed, shuffle
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches of one epoch, the same on every rank."""
        full, rest = divmod(self._num_samples, self._global_batch)
        # A rest too small for all ranks joins the last batch: each rank must have a sample in every batch.
        return full + (1 if rest >= self._size else 0)

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self)
        for batch in range(count):
            start = batch * self._global_batch
            stop = self._num_samples if batch == count - 1 else start + self._global_batch
            first = start + (stop - start) * self._rank // self._size
            last = start + (stop - start) * (self._rank + 1) // self._size
            positions = np.arange(first, last, dtype=np.int64)
            if self._shuffle:
                positions = permute(positions, self._num_samples, self._seed, self._epoch)
            yield positions.tolist()
