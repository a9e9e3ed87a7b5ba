"""The message for a group of iterations: what goes in comes out, and nothing else is taken for a plan."""

from __future__ import annotations

import dataclasses
import random
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.errors import PlanError
from mpidl.parameters import Assignment
from mpidl.scheduling import Action, GroupPlan, capacity
from mpidl.scheduling.plan import MAGIC, VERSION, to_buffer

LARGE = st.integers(0, 2**63)


@st.composite
def plans(draw: Any, max_iterations: int = 6, max_ranks: int = 6, max_groups: int = 3) -> GroupPlan:
    total = draw(st.integers(1, 2**31))
    ranks, groups = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_groups))
    inner = draw(st.lists(st.integers(0, total), min_size=ranks - 1, max_size=ranks - 1))
    spans = draw(st.lists(st.tuples(LARGE, LARGE), min_size=1, max_size=max_iterations))
    rates = st.tuples(*[st.floats(allow_nan=False)] * groups)
    return GroupPlan(
        index=draw(LARGE),
        epoch=draw(LARGE),
        first_iteration=draw(LARGE),
        assignment=Assignment(total, (0, *sorted(inner), total)),
        spans=tuple(spans),
        learning_rates=tuple(draw(rates) for _ in spans),
        actions=draw(st.sampled_from([Action(value) for value in range(64)])),
        budget_s=draw(st.floats(0, allow_nan=False)),
    )


def small_plan() -> GroupPlan:
    return GroupPlan(
        index=3,
        epoch=1,
        first_iteration=40,
        assignment=Assignment(8, (0, 3, 8)),
        spans=((0, 64), (64, 100)),
        learning_rates=((0.1, 0.5), (1e-3, 0.25)),
        actions=Action.END_EPOCH | Action.VALIDATE,
    )


def with_checksum(message: bytearray) -> bytes:
    """What a sender with another idea of a plan would send: its checksum fits."""
    message[12:16] = struct.pack("<I", zlib.crc32(message[16:], zlib.crc32(message[:12])))
    return bytes(message)


@settings(max_examples=150)
@given(plan=plans(), behind=st.binary(max_size=40))
def test_a_plan_comes_out_as_it_went_in_whatever_stands_behind_it(plan: GroupPlan, behind: bytes) -> None:
    assert GroupPlan.decode(plan.encode() + behind) == plan


@pytest.mark.parametrize("rate", [np.pi, 5e-324, 1.7976931348623157e308, 0.0, -0.0, float("inf")])
def test_learning_rates_arrive_to_the_last_bit(rate: float) -> None:
    sent = dataclasses.replace(small_plan(), learning_rates=((rate, 0.1), (0.2, rate)))
    received = GroupPlan.decode(sent.encode())
    assert np.array(received.learning_rates).tobytes() == np.array(sent.learning_rates).tobytes()
    assert all(type(value) is float for row in received.learning_rates for value in row)


def test_a_decoded_plan_holds_plain_integers() -> None:
    # NumPy's would overflow where Python's do not.
    plan = GroupPlan.decode(small_plan().encode())
    numbers = [*plan.assignment.starts, *plan.spans[0], plan.index, plan.epoch, plan.first_iteration]
    assert all(type(number) is int for number in numbers)
    assert isinstance(plan.actions, Action)


@settings(max_examples=100)
@given(plan=plans())
def test_the_capacity_is_that_of_the_largest_plan(plan: GroupPlan) -> None:
    ranks, groups = len(plan.assignment.starts) - 1, len(plan.learning_rates[0])
    room = capacity(plan.num_iterations, ranks, groups)
    assert len(plan.encode()) == room
    assert capacity(plan.num_iterations + 1, ranks, groups) > room
    buffer = np.full(room + 5, 255, np.uint8)
    to_buffer(plan, buffer)
    assert GroupPlan.decode(buffer.tobytes()) == plan
    assert (buffer[room:] == 255).all()


def test_a_shorter_plan_in_a_used_buffer_is_read_alone() -> None:
    long, short = small_plan(), dataclasses.replace(small_plan(), spans=((5, 6),), learning_rates=((1.0, 2.0),))
    buffer = np.zeros(capacity(2, 2, 2), np.uint8)
    for plan in (long, short, long):
        to_buffer(plan, buffer)
        assert GroupPlan.decode(buffer.tobytes()) == plan


def test_a_plan_fits_into_as_many_bytes_as_it_has_and_not_into_one_less() -> None:
    message = small_plan().encode()
    buffer = np.zeros(len(message), np.uint8)
    to_buffer(small_plan(), buffer)
    assert buffer.tobytes() == message
    with pytest.raises(PlanError, match=f"a plan of {len(message)} bytes is too long for this run"):
        to_buffer(small_plan(), buffer[:-1])


def test_every_truncation_is_refused() -> None:
    message = small_plan().encode()
    for length in range(len(message)):
        with pytest.raises(PlanError):
            GroupPlan.decode(message[:length])


@pytest.mark.parametrize("behind", [b"", bytes(200)])
def test_every_changed_byte_is_refused(behind: bytes) -> None:
    message = small_plan().encode()
    for place in range(len(message)):
        for bits in (1, 0x80, 0xFF, random.Random(place).randrange(1, 256)):
            changed = bytearray(message + behind)
            changed[place] ^= bits
            with pytest.raises(PlanError):
                GroupPlan.decode(bytes(changed))


@settings(max_examples=300)
@given(garbage=st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(PlanError):
        GroupPlan.decode(garbage)


@settings(max_examples=300)
@given(
    actions=st.integers(0, 2**16 - 1),
    length=st.one_of(st.integers(0, 120), st.integers(0, 2**32 - 1)),
    body=st.binary(max_size=120),
)
def test_garbage_behind_a_good_header_is_refused(actions: int, length: int, body: bytes) -> None:
    message = struct.pack("<4sHHII", MAGIC, VERSION, actions, length, 0) + body
    cut = bytearray(message[: max(length, 16)])
    for candidate in (with_checksum(cut) + message[len(cut) :], message):
        try:
            plan = GroupPlan.decode(candidate)
        except PlanError:
            continue
        # The only way through: counts and length that fit each other.
        assert len(plan.encode()) == length


@pytest.mark.parametrize("length", [0, 15, 16, 17, 55])
def test_a_length_shorter_than_the_header_is_refused_though_its_checksum_fits(length: int) -> None:
    message = bytearray(small_plan().encode())
    message[8:12] = struct.pack("<I", length)
    head = with_checksum(bytearray(message[: max(length, 16)]))
    with pytest.raises(PlanError):
        GroupPlan.decode(head + bytes(message[len(head) :]))


def test_counts_that_promise_more_than_there_is_allocate_nothing() -> None:
    message = bytearray(small_plan().encode())
    tracemalloc.start()
    for counts in [(2**32 - 1,) * 4, (8, 2, 2**32 - 1, 2), (8, 2**32 - 1, 2, 2), (8, 2, 2, 2**32 - 1)]:
        message[48:64] = struct.pack("<4I", *counts)
        with pytest.raises(PlanError, match="cannot have"):
            GroupPlan.decode(with_checksum(message))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_another_version_and_another_magic_are_named() -> None:
    message = bytearray(small_plan().encode())
    message[4:6] = struct.pack("<H", VERSION + 1)
    with pytest.raises(PlanError, match=f"version {VERSION + 1}, this code reads version {VERSION}"):
        GroupPlan.decode(with_checksum(message))
    with pytest.raises(PlanError, match="begins with b'MPDL', not b'XPDL'"):
        GroupPlan.decode(b"X" + small_plan().encode()[1:])


@pytest.mark.parametrize("actions", [2 * max(Action), 1 << 9])
def test_actions_that_this_version_does_not_know_are_refused(actions: int) -> None:
    message = bytearray(small_plan().encode())
    message[6:8] = struct.pack("<H", actions)
    with pytest.raises(PlanError, match="action"):
        GroupPlan.decode(with_checksum(message))


@pytest.mark.parametrize("starts", [(1, 3, 8), (0, 3, 7), (0, 9, 8)])
def test_ranges_that_leave_partitions_out_are_refused(starts: tuple[int, ...]) -> None:
    message = dataclasses.replace(small_plan(), assignment=Assignment(8, starts)).encode()
    with pytest.raises(PlanError, match="do not cover 8 partitions"):
        GroupPlan.decode(message)
