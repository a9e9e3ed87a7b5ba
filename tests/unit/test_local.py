"""What nodes keep for a restart: which start is whole, and that nothing is taken from files that are not in order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpidl import checkpoint, keeping, local_folder
from mpidl.checkpoint.local_choice import Choice, Held, choose, covers, newest
from mpidl.checkpoint.local_format import (
    Common,
    Header,
    UnfitError,
    create,
    decode_common,
    encode_common,
    open_file,
    open_folder,
    read_header,
    read_slot,
)
from mpidl.checkpoint.slots import NUM_SLOTS, Slot
from mpidl.checkpoint.transfer import checksum
from mpidl.errors import MALFORMED
from mpidl.keeping import Keeping
from mpidl.launching.verdict import MOST_STARTS, Count
from mpidl.start import Loss, Start

HEADER = Header("k" * 32, "0" * 16, 1, 3, "layout", ("weights", "state.exp_avg"), ((5, 8), (10, 12)), 4096)
COMMON = Common("0" * 16, 7, {"iteration": 7}, {"layout": "x"}, ["mean"], b"buffers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The descriptor of a folder for files."""
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    return open_folder("mpidl-0-x")


def written(folder: int, header: Header = HEADER, iteration: int = 7) -> None:
    """A file with a start in its slot 1."""
    content = create(folder, "file", header.encode(), NUM_SLOTS * header.slot_bytes)
    slots = content.reshape(NUM_SLOTS, header.slot_bytes)
    slot = Slot(slots[1], header.keys, header.size, header.head_bytes, has_sum=True)
    for number, vector in enumerate(slot.vectors.values()):
        vector[:] = np.arange(5) + number
    slot.close(iteration, [{"scalars": {"step": 3.0}}])


def read(folder: int, number: int = 1) -> tuple[Header, Slot]:
    descriptor, num_bytes = open_file(folder, "file")
    try:
        header, start = read_header(descriptor, num_bytes)
        return header, read_slot(descriptor, header, start, number)
    finally:
        os.close(descriptor)


def changed(tmp_path: Path, position: int, value: bytes) -> None:
    file = tmp_path / "mpidl-0-x" / "file"
    content = bytearray(file.read_bytes())
    content[position : position + len(value)] = value
    file.write_bytes(content)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_slot_in_a_file_is_read_as_it_was_written(folder: int) -> None:
    written(folder)
    header, slot = read(folder)
    assert header == HEADER
    assert slot.iteration == 7
    assert slot.scalars() == [{"scalars": {"step": 3.0}}]
    assert [vector.tolist() for vector in slot.vectors.values()] == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_a_slot_that_was_never_written_is_not_a_start_of_iteration_0(folder: int) -> None:
    written(folder)
    with pytest.raises(UnfitError, match="checksum"):
        read(folder, 0)


@pytest.mark.parametrize("place", [0, 8, 32, 4096 - 100])
def test_every_byte_of_a_slot_counts(folder: int, tmp_path: Path, place: int) -> None:
    written(folder)
    slot = 4096 + HEADER.slot_bytes
    at = slot + {0: 0, 8: 8, 32: 32}.get(place, 4096 + 36)
    changed(tmp_path, at, bytes([(tmp_path / "mpidl-0-x" / "file").read_bytes()[at] ^ 1]))
    with pytest.raises(UnfitError, match="checksum"):
        read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3}, {"rank": -1}, {"world_size": 0}, {"world_size": 1 << 40}, {"rank": True}, {"keys": ("state.x",)},
        {"keys": ("weights", "weights")}, {"keys": ()}, {"runs": ((0, 1 << 60),)}, {"runs": ((5, 4),)},
        {"runs": ((4, 8), (6, 9))}, {"runs": ((0.5, 2),)}, {"runs": ((-4, 2),)}, {"head_bytes": 5}, {"head_bytes": 0},
        {"head_bytes": 1 << 50}, {"key": 5}, {"layout": None},
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused_though_its_checksum_fits(folder: int, tmp_path: Path, change: dict) -> None:  # type: ignore[type-arg]
    written(folder)
    changed(tmp_path, 0, dataclasses.replace(HEADER, **change).encode())
    with pytest.raises((UnfitError, *MALFORMED)):
        read(folder)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"format": 1, "runs": [[[', b"[" * 3000, b"\xff\xfe", b"null"])
def test_a_text_that_is_no_header_is_refused(folder: int, tmp_path: Path, text: bytes) -> None:
    written(folder)
    head = b"mpidl kept state" + len(text).to_bytes(8, "little") + checksum(np.frombuffer(text, np.uint8)) + text
    changed(tmp_path, 0, head)
    with pytest.raises((UnfitError, *MALFORMED)):
        read(folder)


@pytest.mark.parametrize(("position", "value"), [(0, b"another"), (16, b"\xff" * 8), (24, b"\0"), (200, b"\xee")])
def test_a_damaged_header_is_refused(folder: int, tmp_path: Path, position: int, value: bytes) -> None:
    written(folder)
    changed(tmp_path, position, value)
    with pytest.raises((UnfitError, *MALFORMED)):
        read(folder)


def test_a_file_of_another_length_is_refused(folder: int, tmp_path: Path) -> None:
    written(folder)
    file = tmp_path / "mpidl-0-x" / "file"
    for content in (file.read_bytes()[:-1], file.read_bytes() + b"\0", b"", file.read_bytes()[:30]):
        file.write_bytes(content)
        with pytest.raises((UnfitError, *MALFORMED)):
            read(folder)


def test_a_link_a_pipe_and_a_folder_are_no_files(folder: int, tmp_path: Path) -> None:
    written(folder)
    (tmp_path / "mpidl-0-x" / "file").rename(tmp_path / "elsewhere")
    (tmp_path / "mpidl-0-x" / "file").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        read(folder)
    (tmp_path / "mpidl-0-x" / "file").unlink()
    os.mkfifo(tmp_path / "mpidl-0-x" / "file")
    with pytest.raises(UnfitError):
        read(folder)


def test_a_folder_that_others_may_enter_or_that_is_a_link_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(OSError):  # noqa: PT011
            open_folder(name)
    os.close(open_folder("own"))
    os.close(open_folder("new"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_else_s_folder_is_neither_used_nor_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(PermissionError):
        open_folder("theirs")
    local_folder.remove("theirs")
    assert (tmp_path / "theirs").exists()


def test_what_is_the_same_on_all_ranks_comes_back_and_is_checked() -> None:
    content = encode_common("key", COMMON)
    assert decode_common("key", content) == COMMON
    damaged = bytearray(content)
    damaged[-1] ^= 1
    for wrong in (bytes(damaged), content[:-1], content[:20], b""):
        with pytest.raises(UnfitError):
            decode_common("key", wrong)
    with pytest.raises(UnfitError, match="another launch"):
        decode_common("other", content)


@pytest.mark.parametrize(
    "change", [{"iteration": -1}, {"iteration": 1.5}, {"state": []}, {"fixed": None}, {"travelling": 3}, {"series": 4}]
)
def test_what_is_the_same_on_all_ranks_has_its_types(change: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises((UnfitError, *MALFORMED)):
        decode_common("key", encode_common("key", dataclasses.replace(COMMON, **change)))


# --- which start --------------------------------------------------------------------------------------------------


def held(series: str, size: int, images: dict[int, list[int]], commons: list[int]) -> Held:
    places = {(series, rank, iteration) for rank, found in images.items() for iteration in found}
    return Held(places, {series: size}, {(series, iteration) for iteration in commons})


def test_the_newest_start_is_taken_of_which_every_shard_is_somewhere() -> None:
    # Two nodes of one rank each; rank 1 had not passed its newest one on when its node was lost.
    told = [held("a", 2, {0: [10, 15], 1: [5, 10]}, [10, 15]), Held()]
    assert choose(told, 0) == Choice("a", 10, (0, 0), 0)
    assert newest(told) == 15


def test_a_start_needs_what_is_the_same_on_all_ranks() -> None:
    assert choose([held("a", 1, {0: [10, 15]}, [10])], 0) == Choice("a", 10, (0,), 0)
    assert choose([held("a", 1, {0: [10, 15]}, [])], 0) is None


def test_ranks_of_a_node_share_reading() -> None:
    both = held("a", 4, {rank: [15] for rank in range(4)}, [15])
    assert choose([both, both], 0) == Choice("a", 15, (0, 1, 0, 1), 0)


def test_parts_of_different_series_make_no_start() -> None:
    told = [held("a", 2, {0: [15]}, [15]), held("b", 2, {1: [15]}, [15])]
    assert choose(told, 0) is None


def test_nothing_older_than_the_checkpoint_is_taken() -> None:
    told = [held("a", 1, {0: [10, 15]}, [10, 15])]
    assert choose(told, 15) is None
    assert choose(told, 14) == Choice("a", 15, (0,), 0)


def test_a_number_of_ranks_that_is_too_large_or_not_agreed_on_is_no_start() -> None:
    assert choose([held("a", 1 << 24, {0: [15]}, [15])], 0) is None
    assert choose([held("a", 1, {0: [15]}, [15]), held("a", 2, {0: [15]}, [15])], 0) is None
    assert choose([], 0) is None
    assert newest([]) is None


@pytest.mark.parametrize(
    ("runs", "is_whole"),
    [
        ([[(0, 3)], [(3, 8)]], True), ([[(0, 3), (5, 8)], [(3, 5)]], True), ([[(0, 3)], [(4, 8)]], False),
        ([[(0, 3)], [(2, 8)]], False), ([[(0, 3)]], False), ([[]], False), ([[(0, 8)], []], True),
    ],
)  # fmt: skip
def test_shards_have_to_be_the_whole_vector(runs: list[list[tuple[int, int]]], is_whole: bool) -> None:
    assert covers(runs, 8) == is_whole


# --- between `mpidl launch` and its ranks -------------------------------------------------------------------------


def test_ranks_take_what_is_announced_to_them_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "announced", None)
    announced = local_folder.announcement(tmp_path)
    assert announced.name == local_folder.name_of(tmp_path)
    assert announced.key != local_folder.announcement(tmp_path).key
    for told in (announced, dataclasses.replace(announced, is_restart=True)):
        local_folder.listen(str(told))
        assert local_folder.announced == told
    name, key = announced.name, announced.key
    other = f"mpidl-{os.getuid() + 1}-{'0' * 16}"
    for wrong in (
        None,
        "",
        "/",
        f"{name}/{key}",
        f"../{name}/{key}/0",
        f"{other}/{key}/0",
        f"{name}//0",
        f"{name}/{key}/0\n",
    ):
        local_folder.listen(wrong)
        assert local_folder.announced is None


class Files:
    """`LocalFiles` that has nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def clear(self, *, only_of_others: bool) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Keeping]:
    """The keeping of a course on so many nodes, of a training that `mpidl launch` has started, or nobody."""
    monkeypatch.setattr(keeping, "LocalFiles", Files)
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    monkeypatch.setattr(local_folder, "announced", local_folder.announcement(tmp_path))
    monkeypatch.setattr(checkpoint, "find_in_files", lambda *_: "nothing is kept on the nodes")
    (tmp_path / "ends").mkdir()

    def made(num_nodes: int, start: Start) -> Keeping:
        world = SimpleNamespace(rank=0, local_rank=0, num_nodes=num_nodes, broadcast_object=lambda value: value)
        settings = SimpleNamespace(run_dir=tmp_path, outlives=lambda: True)
        return Keeping(settings, world, None, start)  # type: ignore[arg-type]

    return made


def test_a_training_that_no_launch_has_started_takes_nothing_and_removes_what_was_left(
    keep: Callable[..., Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / local_folder.name_of(tmp_path)
    left.mkdir()
    assert keep(1, Start(resume=True)).files is not None
    assert left.exists()
    monkeypatch.setattr(local_folder, "announced", None)
    assert keep(1, Start(resume=True)).files is None
    assert not left.exists()


def test_what_lies_on_a_lost_node_is_not_forgotten_by_those_that_go_on(
    keep: Callable[..., Keeping], tmp_path: Path
) -> None:
    local_folder.tell_kept(local_folder.Kept(3, "host", iteration=7), tmp_path / "ends")
    course = keep(2, Start(loss=Loss(((2, "host2"),), 0.0)))
    for act in (course.began, course.close):
        act()
        kept = local_folder.read_kept(tmp_path / "ends")
        assert kept is not None
        assert (kept.num_nodes, kept.iteration) == (3, 7), act


@pytest.mark.parametrize("loss", [None, Loss(((1, "host"),), 0.0)], ids=["nothing lost", "a rank lost"])
def test_ranks_on_all_their_nodes_leave_nothing_there(
    loss: Loss | None, keep: Callable[..., Keeping], tmp_path: Path
) -> None:
    keep(2, Start()).began()
    course = keep(2, Start(loss=loss))
    course.began()
    course.close()
    kept = local_folder.read_kept(tmp_path / "ends")
    assert kept is not None
    assert kept.num_nodes == 0


def test_that_nothing_was_kept_is_told_where_something_could_have_been(
    keep: Callable[..., Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = SimpleNamespace(newest_iteration=lambda: 3, fits=None)
    told: list[str] = []

    def find(start: Start) -> None:
        found = keep(1, start).find(checkpoints, lambda event, **fields: told.append(fields["message"]))  # type: ignore[arg-type]
        assert found is None

    find(Start(resume=True))
    assert told == []
    find(Start(resume=True, loss=Loss((), 0.0)))
    monkeypatch.setattr(
        local_folder, "announced", dataclasses.replace(local_folder.announcement(tmp_path), is_restart=True)
    )
    find(Start(resume=True))
    assert told == 2 * ["goes on from the newest checkpoint, after iteration 3: nothing is kept on the nodes"]


def test_a_link_is_not_followed_when_a_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "name").symlink_to(tmp_path / "other")
    local_folder.remove("name")
    local_folder.remove("missing")
    assert (tmp_path / "other" / "file").exists()
    local_folder.remove("other")
    assert not (tmp_path / "other").exists()


def test_starts_that_go_on_from_newer_state_are_not_fruitless() -> None:
    count = Count(9)
    for began in (0, 10, 20, 20):
        count.ended_with(None, began)
    assert count.fruitless == 1
    for _ in range(2):
        count.ended_with(None, 0)
    assert count.fruitless == MOST_STARTS
