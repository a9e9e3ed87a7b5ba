"""What a complete table of counters is refused for, before anything is updated."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mpidl.errors import LayoutError, NonFiniteLossError, TooManyDroppedError
from mpidl.parameters.counters import (
    DROPPED,
    EQUAL_WEIGHTS,
    FIELDS,
    FLAGS,
    LOSS_SUM,
    WEIGHT,
    check_dropped,
    check_table,
)
from mpidl.runtime import faults


def table() -> NDArray[np.float64]:
    """Four partitions with nothing wrong."""
    found = np.zeros((4, len(FIELDS)))
    found[:, LOSS_SUM], found[:, WEIGHT] = 3.5, [2, 0, 1, 4]
    return found


def test_losses_of_any_sign_and_partitions_that_weigh_nothing_are_all_right() -> None:
    good = table()
    good[0, LOSS_SUM] = -1e30
    check_table(good)


@pytest.mark.parametrize(
    ("partition", "field", "value", "message"),
    [
        (2, LOSS_SUM, np.nan, "the loss of partition 2 is nan"),
        (0, LOSS_SUM, -np.inf, "the loss of partition 0 is -inf"),
        (3, WEIGHT, -1.0, "the weight of partition 3 is -1.0"),
        (1, WEIGHT, np.nan, "the weight of partition 1 is nan"),
        (1, WEIGHT, np.inf, "the weight of partition 1 is inf"),
    ],
)
def test_what_nothing_can_be_divided_by_is_an_error_that_names_the_partition(
    partition: int, field: int, value: float, message: str
) -> None:
    bad = table()
    bad[partition, field] = value
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        check_table(bad)
    assert faults.is_on_all_ranks(caught.value)


def test_ranks_that_weigh_otherwise_than_others_are_named() -> None:
    mixed = table()
    mixed[[1, 3], FLAGS] = EQUAL_WEIGHTS
    with pytest.raises(LayoutError, match=r"rank 1 called step\(\) without num_samples, rank 0 with it") as caught:
        check_table(mixed)
    assert faults.is_on_all_ranks(caught.value)


def test_as_many_may_be_dropped_as_was_said_and_no_more() -> None:
    dropped = table()
    dropped[[0, 2], FLAGS] = DROPPED
    for most in (None, 4, 2):
        check_dropped(dropped, most)
    with pytest.raises(TooManyDroppedError, match="2 of 4 partitions were dropped; at most 1 may be"):
        check_dropped(dropped, 1)
