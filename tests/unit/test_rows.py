"""Gradients in rows: those of plain PyTorch whatever is done to them, and what was announced early is told truly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from mpidl.parameters.layout import FlatLayout, Piece
from mpidl.parameters.rows import Announcements, GradientRows
from tests.failing_graph import Failure, fails_in_backward

Float32Array = npt.NDArray[np.float32]

# --- announcements ----------------------------------------------------------------------------------------------------

SPANS = [(0, 10), (16, 40), (48, 60), (64, 70)]
BUCKETS = [(0, 32), (32, 64), (64, 80)]
"""The second parameter lies in two buckets, the second bucket holds parts of two parameters."""


class Watched:
    """Announcements, what they announced, and views as a row has them."""

    def __init__(self) -> None:
        self.announced: list[int] = []
        self.views = [torch.zeros(stop - start) for start, stop in SPANS]
        self.announcements = Announcements(SPANS, BUCKETS, self.announced.append)

    def begin(self) -> None:
        """An iteration and its last row."""
        self.announced.clear()
        self.announcements.begin()
        self.announcements.open(True)

    def row(self, added: list[int], *, is_last: bool = True, begins: bool = True) -> bool:
        """One row from its opening to its end; returns whether what was announced held."""
        if begins:
            self.announced.clear()
            self.announcements.begin()
        self.announcements.open(is_last)
        for index in added:
            self.add(index)
        return self.announcements.close(self.views)

    def add(self, index: int) -> None:
        self.views[index].add_(1)
        self.announcements.add(index, self.views[index])


def test_the_first_row_announces_nothing_and_the_second_each_bucket_at_its_last_gradient() -> None:
    watched = Watched()
    assert watched.row([3, 2, 1, 0])
    assert watched.announced == []
    watched.begin()
    found = []
    for index in (3, 2, 1, 0):
        watched.add(index)
        found.append(list(watched.announced))
    assert found == [[2], [2], [2, 1], [2, 1, 0]]
    assert watched.announcements.has_announced
    assert watched.announcements.close(watched.views)


def test_a_parameter_that_gets_several_gradients_is_complete_at_the_last() -> None:
    watched = Watched()
    watched.row([3, 3, 2, 1, 0, 0, 0])
    assert watched.row([3, 0, 2, 0, 1, 3, 0])
    assert watched.announced == [1, 2, 0]


def test_rows_that_are_not_the_last_announce_nothing_and_nothing_is_learnt_from_them() -> None:
    watched = Watched()
    watched.row([3, 2, 1, 0])
    assert watched.row([3, 3, 2, 1, 0], is_last=False)
    assert watched.announced == []
    assert watched.row([3, 2, 1, 0])
    assert watched.announced == [2, 1, 0]


def test_a_bucket_whose_parameters_get_fewer_gradients_is_not_announced_and_what_was_holds() -> None:
    watched = Watched()
    watched.row([3, 2, 1, 0])
    assert watched.row([3, 2, 0])
    assert watched.announced == [2]
    assert watched.row([3, 2, 0])  # the next knows
    assert watched.announced == [2, 1, 0]


def test_one_gradient_more_than_before_does_not_hold_once_and_is_known_the_next_time() -> None:
    watched = Watched()
    watched.row([3, 2, 1, 0])
    assert not watched.row([3, 2, 1, 0, 3])
    assert watched.row([3, 2, 1, 0, 3])
    assert watched.announced == [1, 0, 2]


def test_a_first_gradient_for_a_parameter_that_got_none_does_not_hold() -> None:
    watched = Watched()
    watched.row([3, 1, 0])
    assert watched.row([3, 1, 0])
    assert not watched.row([3, 1, 0, 2])
    assert watched.row([3, 1, 0])  # the second bucket waited for the third parameter
    assert 1 not in watched.announced


@pytest.mark.parametrize("index", range(4))
def test_a_gradient_that_is_changed_after_it_was_announced_does_not_hold(index: int) -> None:
    watched = Watched()
    watched.row([3, 2, 1, 0])
    watched.begin()
    for each in (3, 2, 1, 0):
        watched.add(each)
    watched.views[index].mul_(2)
    assert not watched.announcements.close(watched.views)
    assert watched.row([3, 2, 1, 0])


def test_a_change_before_the_last_gradient_holds() -> None:
    watched = Watched()
    watched.row([3, 3, 2, 1, 0])
    watched.begin()
    watched.add(3)
    watched.views[3].mul_(2)
    for index in (3, 2, 1, 0):
        watched.add(index)
    assert watched.announcements.close(watched.views)


def test_a_bucket_without_any_gradient_is_announced_with_the_first_of_the_others() -> None:
    watched = Watched()
    watched.row([0])
    watched.begin()
    assert watched.announced == []  # it may be thrown away still
    watched.add(0)
    assert watched.announced == [1, 2, 0]
    assert watched.announcements.close(watched.views)
    assert not watched.row([0, 3])
    watched.row([1])
    assert watched.row([1])
    assert watched.announced == [2, 0, 1]


def test_a_gradient_that_is_changed_every_time_is_waited_for() -> None:
    watched = Watched()
    told = []
    for _ in range(6):
        watched.begin()
        for index in (3, 2, 1, 0):
            watched.add(index)
        watched.views[3].mul_(2)
        told.append((watched.announcements.close(watched.views), list(watched.announced)))
    assert told == [(True, [])] + [(True, [1, 0])] * 5
    assert watched.row([3, 2, 1, 0])
    assert watched.row([3, 2, 1, 0])
    assert watched.announced == [2, 1, 0]


def test_a_row_that_is_thrown_away_after_an_announcement_does_not_hold_and_one_before_does() -> None:
    for thrown_away, expected in (([], True), ([3], False)):
        watched = Watched()
        watched.row([3, 2, 1, 0])
        watched.begin()
        for index in thrown_away:
            watched.add(index)
        assert watched.row([3, 2, 1, 0], begins=False) == expected
        watched.begin()
        for index in thrown_away:
            watched.add(index)
        watched.announcements.open(True)
        assert watched.row([2, 1, 0], begins=False)  # thrown away as often as the last time, and once more
        watched.row([3, 2, 1, 0])
        assert watched.row([3, 2, 1, 0])
        assert watched.announced == [2, 1, 0]


def test_where_rows_are_thrown_away_every_time_the_last_one_is_announced() -> None:
    watched = Watched()
    told = []
    for _ in range(5):
        watched.begin()
        for index in (3, 2, 1, 0):
            watched.add(index)
        watched.announcements.open(True)
        too_early = list(watched.announced)
        for index in (3, 2, 1, 0):
            watched.add(index)
        told.append((watched.announcements.close(watched.views), too_early, list(watched.announced)))
    assert told == [(True, [], [])] + [(True, [], [2, 1, 0])] * 4


def test_a_row_that_was_closed_and_not_exchanged_is_remembered() -> None:
    for is_thrown_away in (True, False):
        watched = Watched()
        watched.row([3, 2, 1, 0])
        assert watched.row([3, 2, 1, 0])
        if is_thrown_away:
            watched.announcements.open(True)
        else:
            watched.add(0)
        assert not watched.announcements.close(watched.views)
        assert not watched.announcements.close(watched.views)
        assert not watched.row([3, 2, 1, 0], begins=False)
        assert watched.row([3, 2, 1, 0])


# --- rows -------------------------------------------------------------------------------------------------------------

SHAPES = [(5, 3), (40,), (), (0, 2), (33,), (7, 2)]
NAMES = [f"p{index}" for index in range(len(SHAPES))]


class Model(nn.Module):
    """Parameters that are used as one wishes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in zip(NAMES, SHAPES, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def loss(self, factors: dict[str, float]) -> torch.Tensor:
        """Parameters of a negative factor get no gradient: their part of the graph raises."""
        total = torch.zeros(())
        for name, factor in factors.items():
            parameter = self.get_parameter(name)
            part = (parameter.square() * abs(factor)).sum() + parameter.sum()
            total = total + (fails_in_backward(part) if factor < 0 else part)
        return total


class Beside:
    """A model whose gradients go into rows, and its twin in plain PyTorch, to which the same is done.

    What is announced is read at once, as an exchange may; who trusts the announcement has these values.
    """

    def __init__(self, bucket_size: int) -> None:
        self.model, self.twin = Model(), Model()
        parameters = list(self.model.named_parameters())
        self.layout = FlatLayout.of((name, tuple(p.shape)) for name, p in parameters)
        size = self.layout.size
        self.row: Float32Array = np.full(size, np.nan, np.float32)
        self.buckets: list[Piece] = [(a, min(a + bucket_size, size)) for a in range(0, size, bucket_size)]
        self.read: dict[int, Float32Array] = {}
        self.rows = GradientRows(parameters, self.layout, [self.row], self.buckets, self._announced)
        self.rows.open(0)
        for slot in self.layout.slots:
            self.row[slot.stop : -(-slot.stop // 16) * 16] = 0  # gaps

    def _announced(self, bucket: int) -> None:
        start, stop = self.buckets[bucket]
        self.read.setdefault(bucket, self.row[start:stop].copy())

    def both(self, action: Callable[[nn.Module], None]) -> None:
        failed = []
        for model in (self.model, self.twin):
            try:
                action(model)
            except Failure:
                failed.append(model)
        assert len(failed) in (0, 2)

    def assert_ends_alike(self) -> bool:
        """End the iteration: compare, and begin the next; returns whether what was announced was told to hold."""
        holds = self.rows.close()
        expected = np.zeros(self.layout.size, np.float32)
        for slot, parameter in zip(self.layout.slots, self.twin.parameters(), strict=True):
            if parameter.grad is not None:
                expected[slot.offset : slot.stop] = parameter.grad.numpy().reshape(-1)
            parameter.grad = None
        np.testing.assert_array_equal(self.row, expected)
        if holds:
            for bucket, values in self.read.items():
                np.testing.assert_array_equal(values, self.row[slice(*self.buckets[bucket])])
        self.read.clear()
        self.rows.begin()
        self.rows.open(0, is_last=True)
        return holds


def backward(factors: dict[str, float]) -> Callable[[Beside], None]:
    return lambda beside: beside.both(lambda model: model.loss(factors).backward())  # type: ignore[operator]


def zero(set_to_none: bool) -> Callable[[Beside], None]:
    return lambda beside: beside.both(lambda model: model.zero_grad(set_to_none))


def open_again(beside: Beside) -> None:
    """What the manager's `zero_grad` does."""
    beside.rows.open(0, is_last=beside.rows.is_last)
    beside.twin.zero_grad()


def change(name: str) -> Callable[[Beside], None]:
    def in_place(model: nn.Module) -> None:
        gradient = model.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(0.5).add_(1)

    return lambda beside: beside.both(in_place)


def replace(name: str, *, by_none: bool) -> Callable[[Beside], None]:
    def other(model: nn.Module) -> None:
        parameter = model.get_parameter(name)
        parameter.grad = None if by_none else torch.full_like(parameter, 3.5)

    return lambda beside: beside.both(other)


def clip(beside: Beside) -> None:
    def in_place(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    beside.both(in_place)


ALL = dict.fromkeys(NAMES, 1.0)
FIRST = dict.fromkeys(NAMES[:2], 1.0)
FACTORS = st.sampled_from([1.0, 2.5]) | st.sampled_from([1.0, 0.5, 3.0, -1.0])
ACTIONS = (
    st.sampled_from([backward(ALL), backward(FIRST), backward(FIRST)])
    | st.dictionaries(st.sampled_from(NAMES), FACTORS).filter(bool).map(backward)
    | st.booleans().map(zero)
    | st.just(open_again)
    | st.sampled_from(NAMES).map(change)
    | st.builds(replace, st.sampled_from(NAMES), by_none=st.booleans())
    | st.just(clip)
)
ITERATIONS = st.lists(st.lists(ACTIONS, max_size=5), min_size=2, max_size=6)


@settings(max_examples=300)
@given(iterations=ITERATIONS, bucket_size=st.sampled_from([16, 48, 64, 1000]))
@example([[backward(FIRST)], [backward(FIRST)], [backward(ALL), zero(True), backward(FIRST)]], 48)
@example([[backward(FIRST)], [backward(FIRST)], [backward(FIRST), replace("p4", by_none=False)]], 1000)
@example([[backward(ALL)], [backward(ALL)], [backward({**ALL, "p1": -1.0}), backward(ALL)]], 16)
@example([[backward(ALL)], [backward(ALL)], [backward({**ALL, "p1": -1.0}), zero(True), backward(ALL)]], 16)
@example([[backward(ALL)], [backward(ALL)], [backward(ALL), open_again]], 16)
def test_rows_have_the_gradients_of_plain_pytorch_and_what_holds_was_read_right(
    iterations: list[list[Callable[[Beside], None]]], bucket_size: int
) -> None:
    beside = Beside(bucket_size)
    beside.assert_ends_alike()
    for actions in iterations:
        for action in actions:
            action(beside)
        beside.assert_ends_alike()


@pytest.mark.parametrize("bucket_size", [16, 48, 1000])
def test_all_buckets_of_an_ordinary_iteration_are_announced_and_hold(bucket_size: int) -> None:
    beside = Beside(bucket_size)
    beside.assert_ends_alike()
    for iteration in range(4):
        zero(True)(beside)
        backward(ALL)(beside)
        assert set(beside.read) == (set(range(len(beside.buckets))) if iteration else set())
        assert beside.assert_ends_alike()


@pytest.mark.parametrize(
    "action",
    [zero(True), zero(False), open_again, change("p1"), replace("p4", by_none=False), clip, backward(ALL)],
    ids=["to None", "to zero", "open", "change", "replace", "clip", "again"],
)
def test_what_is_done_to_gradients_after_the_announcement_is_told(action: Callable[[Beside], None]) -> None:
    beside = Beside(16)
    for _ in range(3):
        backward(ALL)(beside)
        assert beside.assert_ends_alike()
    backward(ALL)(beside)
    action(beside)
    assert not beside.assert_ends_alike()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_behind_a_gradient_does_not_live_on_in_the_row() -> None:
    beside = Beside(16)
    for _ in range(3):
        beside.both(lambda model: model.loss(ALL).backward(create_graph=True))  # type: ignore[operator]
        for parameter in filter(torch.numel, beside.model.parameters()):
            assert parameter.grad is not None
            assert not parameter.grad.requires_grad
        for parameter in beside.twin.parameters():
            parameter.grad = parameter.grad.detach() if parameter.grad is not None else None
        beside.assert_ends_alike()
