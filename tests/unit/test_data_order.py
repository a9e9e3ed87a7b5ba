"""The order of an epoch and the seeds of its samples."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.data.order import Order, Request, kept_random_state, permute, sample_seed, seed_everything

SEEDS = st.integers(0, 2**64 - 1)


def standard_score(observed: npt.NDArray[Any], expected: float, freedom: int) -> float:
    """How far a chi-squared sum is from its mean, in its standard deviations."""
    return float(((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@settings(deadline=None)
@given(num_samples=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_an_epoch_holds_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(num_samples), num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@settings(deadline=None)
@given(data=st.data(), num_samples=st.integers(1, 10**18), seed=SEEDS)
def test_a_position_s_sample_does_not_depend_on_the_positions_asked_with_it(
    data: st.DataObject, num_samples: int, seed: int
) -> None:
    positions = data.draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=20))
    together = permute(np.array(positions), num_samples, seed, 3)
    assert [permute(np.array([each]), num_samples, seed, 3)[0] for each in positions] == together.tolist()
    assert ((together >= 0) & (together < num_samples)).all()
    assert len(set(together.tolist())) == len(set(positions))


def test_ten_to_the_eighteen_samples_cost_no_more_memory_than_the_positions() -> None:
    positions = np.arange(10**18 - 1000, 10**18)
    tracemalloc.start()
    permute(positions, 10**18, 1, 2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20 * positions.nbytes


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_frequent(num_samples: int) -> None:
    num_orders, num_seeds = math.factorial(num_samples), 2500
    positions = np.arange(num_samples)
    found = Counter(tuple(permute(positions, num_samples, seed, 0).tolist()) for seed in range(num_seeds))
    counts = np.array([found[order] for order in itertools.permutations(range(num_samples))])
    assert counts.sum() == num_seeds
    assert abs(standard_score(counts, num_seeds / num_orders, num_orders - 1)) < 4


@pytest.mark.parametrize("num_samples", [9, 16, 100])
def test_neighbours_and_places_are_equally_frequent(num_samples: int) -> None:
    num_epochs = 1000
    orders = np.array([permute(np.arange(num_samples), num_samples, 7, epoch) for epoch in range(num_epochs)])
    places = np.zeros((num_samples, num_samples))
    np.add.at(places, (np.tile(np.arange(num_samples), num_epochs), orders.ravel()), 1)
    assert abs(standard_score(places, num_epochs / num_samples, (num_samples - 1) ** 2)) < 4
    distances = np.bincount((orders[:, 1:] - orders[:, :-1]).ravel() % num_samples, minlength=num_samples)[1:]
    assert abs(standard_score(distances, distances.sum() / (num_samples - 1), num_samples - 2)) < 5


def test_orders_of_other_seeds_epochs_and_positions_are_unrelated() -> None:
    num_samples = 100_000
    positions = np.arange(num_samples)
    orders = [permute(positions, num_samples, seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0), (0, 1)]]
    for one, other in itertools.combinations([positions, *orders], 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(num_samples)
        assert (one == other).sum() < 10  # 1 is expected


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # What a run once had; there is nothing to compare it with. A change here breaks resuming of older runs.
    assert permute(np.arange(6), 10, 42, 1).tolist() == [1, 7, 9, 3, 6, 5]
    assert sample_seed(1, 2, 3) == 18283258009843326564


@pytest.mark.parametrize(("positions", "num_samples"), [([10], 10), ([-1], 10), ([0], 0), ([0], 10**18 + 1)])
def test_positions_outside_the_epoch_are_refused(positions: list[int], num_samples: int) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        permute(np.array(positions), num_samples, 0, 0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_requests_looked_up_together_are_as_if_looked_up_alone(shuffle: bool) -> None:
    order = Order(num_samples=100, seed=5, shuffle=shuffle)
    requests = [Request(2, 0, 7), Request(2, 90, 100), Request(2, 3, 4)]
    together = order.indices(requests)
    for request, indices in zip(requests, together, strict=True):
        expected = np.arange(request.start, request.stop)
        expected = permute(expected, 100, 5, 2) if shuffle else expected
        assert np.array_equal(indices, expected)


@given(seed=SEEDS, epoch=st.integers(0, 1000), index=st.integers(0, 10**18))
def test_a_sample_s_seed_changes_with_each_of_its_parts(seed: int, epoch: int, index: int) -> None:
    seeds = {
        sample_seed(seed, epoch, index),
        sample_seed(seed ^ 1, epoch, index),
        sample_seed(seed, epoch + 1, index),
        sample_seed(seed, epoch, index + 1),
    }
    assert len(seeds) == 4
    assert all(0 <= each < 2**64 for each in seeds)


def draw() -> tuple[float, float, float]:
    return torch.rand(1, dtype=torch.float64).item(), float(np.random.rand()), random.random()


def test_seeding_repeats_what_torch_numpy_and_random_draw() -> None:
    with kept_random_state():
        seed_everything(sample_seed(1, 2, 3))
        first = draw()
        seed_everything(sample_seed(1, 2, 4))
        other = draw()
        seed_everything(sample_seed(1, 2, 3))
        assert draw() == first
    assert not set(first) & set(other)


def test_torch_and_numpy_do_not_draw_the_same_stream() -> None:
    with kept_random_state():
        seed_everything(7)
        assert torch.randint(0, 2**31, (4,)).tolist() != np.random.randint(0, 2**31, 4).tolist()
        seed_everything(7)
        of_torch = torch.rand(2000).numpy()
        assert abs(np.corrcoef(of_torch, np.random.rand(2000))[0, 1]) < 0.1


def test_the_random_state_is_kept_even_when_the_block_fails() -> None:
    with kept_random_state():
        seed_everything(1)
        expected = draw()
        seed_everything(1)
        with pytest.raises(TypeError), kept_random_state():
            seed_everything(None)  # type: ignore[arg-type]
        assert draw() == expected
