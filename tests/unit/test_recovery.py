"""What is kept for the case that a rank is lost: which start is found, and that no half-written one is."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.checkpoint import memory, slots
from mpidl.config import Config
from mpidl.errors import ConfigError, EndedElsewhereError
from mpidl.runtime import faults, ulfm
from mpidl.summary import describe_recovery


def slot(keys: tuple[str, ...] = ("weights", "state.momentum_buffer"), size: int = 5) -> slots.Slot:
    content = np.zeros(4096 + 4 * size * len(keys), np.uint8)
    return slots.Slot(content, keys, size, head_bytes=4096)


def test_a_slot_that_is_being_written_has_no_iteration() -> None:
    one = slot()
    one.close(7, [{"arrays": ["momentum_buffer"], "scalars": {"step": 7.0}}])
    assert one.iteration == 7
    one.open()
    one.vectors["weights"][:] = 1
    assert one.iteration not in (7, 0)


def test_vectors_and_scalars_of_a_slot_do_not_share_memory() -> None:
    one, scalars = slot(), [{"arrays": [], "scalars": {"step": 3.0}, "tensor_scalars": ["step"]}]
    one.close(3, scalars)
    for number, vector in enumerate(one.vectors.values()):
        vector[:] = number + 1
    assert one.iteration == 3
    assert one.scalars() == scalars
    assert [vector.tolist() for vector in one.vectors.values()] == [[1.0] * 5, [2.0] * 5]


def test_scalars_that_have_no_room_leave_the_slot_incomplete() -> None:
    one = slot()
    one.open()
    one.close(3, [{"scalars": {"name": "x" * 5000}}])
    assert one.iteration < 0


def test_the_newest_start_is_taken_that_can_be_read_of_every_rank() -> None:
    # Rank 1 of three has died a start behind; two live, and both can read all of them.
    told = [{0: [10, 15], 1: [5, 10], 2: [10, 15]}] * 2
    assert memory._best(told, 3, {5, 10, 15}) == (10, {0: [0, 1], 1: [0, 1], 2: [0, 1]})


def test_an_image_is_read_by_those_that_can() -> None:
    told = [{0: [10, 15], 1: [10, 15]}, {2: [15, 10], 3: [10, 15]}]  # two nodes of two ranks; one of each lives
    assert memory._best(told, 4, {10, 15}) == (15, {0: [0], 1: [0], 2: [1], 3: [1]})


def test_what_some_do_not_know_all_of_is_not_taken() -> None:
    told = [{0: [10, 15, 17], 1: [10, 15, 17]}] * 2  # one rank has ended all that was due behind iteration 17
    assert memory._best(told, 2, {10, 15}) == (15, {0: [0, 1], 1: [0, 1]})


@pytest.mark.parametrize("told", [[{0: [10, 15]}], [{0: [15], 1: [10]}], [{}], []])
def test_nothing_is_found_where_a_shard_is_lost(told: list[dict[int, list[int]]]) -> None:
    assert memory._best(told, 2, {10, 15}) is None


@pytest.mark.parametrize(
    ("sizes", "buddies"),
    [
        ((4,), [None, None, None, None]),
        ((2, 2), [2, 3, 0, 1]),
        ((1, 1, 1), [1, 2, 0]),
        ((3, 1), [3, 3, 3, 0]),
        ((1, 2, 2), [1, 3, 4, 0, 0]),
    ],
)
def test_a_rank_s_buddy_is_on_the_next_node(sizes: tuple[int, ...], buddies: list[int | None]) -> None:
    assert [slots.buddy_of(rank, sizes) for rank in range(sum(sizes))] == buddies


def test_without_ulfm_no_error_is_a_loss_and_nothing_is_guarded() -> None:
    assert not ulfm.is_on()
    assert not ulfm.is_loss(RuntimeError("anything"))
    ulfm.commit()  # has nothing to wait for


def test_a_rank_that_another_has_ended_leaves_with_its_code_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ulfm, "_has_ended", False)
    assert faults.end_job(EndedElsewhereError(3)) == 3
    assert capsys.readouterr() == ("", "")
    assert ulfm.has_ended()


@pytest.mark.parametrize(
    ("lost", "ranks", "said"),
    [
        (((2, "node07"),), 3, "rank 2 (node07) was lost; 3 ranks go on from iteration 41, from memory, 0.25 s later"),
        (
            ((0, "a"), (3, "b")),
            1,
            "rank 0 (a) and rank 3 (b) were lost; 1 rank goes on from iteration 41, from memory, 0.25 s later",
        ),
    ],
)
def test_a_loss_is_told_with_who_where_and_how_long(lost: tuple[tuple[int, str], ...], ranks: int, said: str) -> None:
    told = describe_recovery(lost, ranks, 40, 2, 0.25, "memory")
    assert told["message"] == said
    assert [each["host"] for each in told["lost"]] == [host for _, host in lost]


def test_recovery_is_auto_or_off() -> None:
    assert Config(recovery="off").recovery == "off"
    with pytest.raises(ConfigError, match="recovery is 'on', must be 'auto' or 'off'|recovery"):
        Config(recovery="on")  # type: ignore[arg-type]
