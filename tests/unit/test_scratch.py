"""Borrowed message buffers: nobody's memory is another's while both have it, and little is kept."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from mpidl.parameters.scratch import Scratch


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.float64])
def test_what_is_borrowed_has_the_size_and_type_wanted(dtype: type) -> None:
    scratch = Scratch()
    for size in (0, 1, 1000, 7):
        with scratch.borrow(size, dtype) as array:
            assert array.shape == (size,)
            assert array.dtype == dtype
            array[:] = 1


def test_memory_that_was_given_back_is_used_again() -> None:
    scratch = Scratch()
    with scratch.borrow(1000, np.float32) as first:
        address = first.ctypes.data
    for size in (1000, 10, 500):
        with scratch.borrow(size, np.float32) as again:
            assert again.ctypes.data == address


@pytest.mark.parametrize("seed", range(5))
def test_no_two_borrowers_share_memory_and_as_much_is_kept_as_was_out_at_once(seed: int) -> None:
    generator, scratch = random.Random(seed), Scratch()
    out: list[tuple[contextlib.ExitStack, np.ndarray, int]] = []
    most = 0
    for step in range(300):
        if out and generator.random() < 0.5:
            stack, array, value = out.pop(generator.randrange(len(out)))
            assert (array == value).all()
            stack.close()
        elif len(out) < 6:
            stack = contextlib.ExitStack()
            array = stack.enter_context(scratch.borrow(generator.randrange(2000), np.int32))
            array[:] = step
            out.append((stack, array, step))
        most = max(most, len(out))
    for stack, array, value in out:
        assert (array == value).all()
        stack.close()
    assert len(scratch._free) == most
    assert scratch.num_bytes == sum(each.size for each in scratch._free)


def test_memory_comes_back_after_an_exception() -> None:
    scratch = Scratch()
    with pytest.raises(RuntimeError), scratch.borrow(10, np.float32):
        raise RuntimeError
    assert len(scratch._free) == 1
