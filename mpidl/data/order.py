"""The order of an epoch and the seeds of its samples, as pure functions: nothing is listed, stored or sent.

Every rank computes the part of an epoch's order that it needs from (seed, epoch, position) alone, so an order
of 10**18 samples costs no more memory than the positions asked for, and moving a partition to another rank
moves nothing but two numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]

MAX_SAMPLES = 10**18

# Measured (tests/unit/test_data_order.py): with 12 rounds the permutations of up to 5 samples are equally
# frequent over the seeds. Fewer rounds are enough for large sets, where 12 cost 0.2 microseconds a sample.
_NUM_ROUNDS = 12

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ORDER, _SAMPLE, _NUMPY, _PYTHON, _PARTITION = range(1, 6)  # what a key is for, so that no two uses share one


class Request(NamedTuple):
    """The positions [start, stop) of an epoch's order: one batch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a data set's samples in every epoch, and their seeds.

    Attributes:
        num_samples: the size of the data set.
        seed: the run's seed.
        shuffle: whether epochs are shuffled; if not, position i holds sample i.
    """

    num_samples: int
    seed: int
    shuffle: bool

    def indices(self, requests: Sequence[Request]) -> list[Int64Array]:
        """Give the sample indices of each request; all are of one epoch.

        They are looked up together, since a look-up costs 150 microseconds before its first sample.
        """
        positions = np.concatenate([np.arange(each.start, each.stop, dtype=np.int64) for each in requests])
        if self.shuffle:
            positions = permute(positions, self.num_samples, self.seed, requests[0].epoch)
        return np.split(positions, np.cumsum([each.stop - each.start for each in requests])[:-1])

    def seeds(self, epoch: int, indices: Int64Array) -> list[int]:
        """Give the seeds of samples in an epoch: of the sample, wherever it stands in the order."""
        return [sample_seed(self.seed, epoch, index) for index in indices.tolist()]


def permute(positions: Int64Array, num_samples: int, seed: int, epoch: int) -> Int64Array:
    """Give the sample index at each position of a shuffled epoch.

    For one (num_samples, seed, epoch) this is a bijection of [0, num_samples) onto itself: a Feistel network
    over pairs (left, right) with left < a and right < b, a * b just above num_samples, whose rounds add a keyed
    hash of one half to the other, modulo a or b. An index that falls past the last sample is sent through the
    network again until it does not (cycle walking), which keeps the bijection. `a` is even, so that rounds can
    be odd permutations; with both sides odd only half of all orders could come up.

    Args:
        positions: int64, any shape; each in [0, num_samples).
        num_samples: at most 10**18.
        seed: the run's seed; taken modulo 2**64.
        epoch: the epoch's number; taken modulo 2**64.

    Returns:
        int64, the shape of positions; a new array. The same on every rank and machine.

    Raises:
        ValueError: num_samples or a position is out of range.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 5.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"{num_samples} samples; an epoch has from 1 to {MAX_SAMPLES}")
    values = np.asarray(positions, np.int64)
    if values.size and (values.min() < 0 or values.max() >= num_samples):
        raise ValueError(f"positions from {values.min()} to {values.max()}; they must lie in [0, {num_samples})")
    num_left = math.isqrt(num_samples - 1) + 1
    num_left += num_left % 2
    num_right = -(-num_samples // num_left)
    keys = np.array([_mix(_ORDER, seed, epoch, number) for number in range(_NUM_ROUNDS)], np.uint64)
    result = _feistel(values.astype(np.uint64).ravel(), num_left, num_right, keys)
    outside = np.flatnonzero(result >= num_samples)
    while outside.size:
        result[outside] = _feistel(result[outside], num_left, num_right, keys)
        outside = outside[result[outside] >= num_samples]
    return result.astype(np.int64).reshape(values.shape)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Give the 64-bit seed of one sample in one epoch, for `seed_everything` before the sample is read."""
    return _mix(_SAMPLE, seed, epoch, index)


def partition_seed(seed: int, iteration: int, partition: int) -> int:
    """Give the 64-bit seed of one partition's forward and backward (dropout), for `seed_everything`."""
    return _mix(_PARTITION, seed, iteration, partition)


def seed_everything(seed: int) -> None:
    """Seed torch's CPU generator, NumPy's global one and Python's `random`, each differently.

    Takes about 20 microseconds. torch.manual_seed takes 200, because it prepares a call for every kind of
    device; random numbers drawn on a GPU are not seeded here.

    Args:
        seed: taken modulo 2**64.
    """
    from torch import default_generator

    seed &= _MASK
    # torch and NumPy run the same Mersenne Twister from 32 bits of their seeds: with one seed for both, an
    # augmentation that draws from both would draw correlated numbers.
    default_generator.manual_seed(seed)
    np.random.seed(_mix(_NUMPY, seed) >> 32)
    random.seed(_mix(_PYTHON, seed))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the random states of torch (CPU), NumPy and `random` back at the end of the block."""
    from torch import default_generator

    states = default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _feistel(values: UInt64Array, num_left: int, num_right: int, keys: UInt64Array) -> UInt64Array:
    """Send values in [0, num_left * num_right) through the keyed rounds; a new array."""
    sides = (np.uint64(num_left), np.uint64(num_right))
    halves = list(np.divmod(values, sides[1]))
    for number, key in enumerate(keys):
        target = number % 2
        halves[target] += _hash(halves[1 - target], key) % sides[target]
        halves[target] %= sides[target]
    joined: UInt64Array = halves[0] * sides[1] + halves[1]
    return joined


def _hash(values: UInt64Array, key: np.uint64) -> UInt64Array:
    """Mix each value with the key: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = values ^ key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_MULTIPLIERS[0])
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_MULTIPLIERS[1])
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _mix(*words: int) -> int:
    """Hash whole numbers, each modulo 2**64, into one of 64 bits; their order counts."""
    state = 0
    for word in words:
        state = ((state ^ (word & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MULTIPLIERS[0]) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLIERS[1]) & _MASK
        state ^= state >> 31
    return state
