"""Checkpoints' files without MPI: what is written is found, what is damaged is noticed, whole ones stay."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import pathlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import mpidl
from mpidl.checkpoint import files, load_weights, reading, transfer, weights
from mpidl.checkpoint.files import Keep
from mpidl.checkpoint.image import CHUNK_BYTES, ShardImage, chunk_sums
from mpidl.checkpoint.manifest import MANIFEST
from mpidl.checkpoint.reading import PieceReader, ShardFile, Wanted, overlaps
from mpidl.checkpoint.report import REPORT_BYTES, Report
from mpidl.checkpoint.snapshot import Compaction
from mpidl.checkpoint.transfer import SUM_BYTES, pages
from mpidl.errors import CheckpointError, DamagedError
from mpidl.parameters import FlatLayout
from mpidl.parameters.layout import Piece

KEYS = ["weights", "state.exp_avg"]
SIZE = 700_001  # two vectors: more than one chunk, and no whole number of them
NAME = "shard-00000-of-00001.safetensors"


@pytest.fixture
def shard(tmp_path: Path) -> tuple[ShardImage, dict[str, Any]]:
    """A shard's file, and its entry of the manifest."""
    image = ShardImage(KEYS, SIZE)
    for seed, vector in enumerate(image.vectors.values()):
        vector[:] = np.random.default_rng(seed).standard_normal(SIZE, np.float32)
    entry = {"file": NAME, "runs": [(0, SIZE)], "vectors": KEYS, "data_start": image.data_start}
    return image, {**entry, "checksum": image.write(tmp_path / NAME)}


@pytest.fixture
def reader() -> Iterator[PieceReader]:
    with PieceReader() as reader:
        yield reader


def test_a_shard_s_file_is_what_any_reader_of_safetensors_takes(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]]
) -> None:
    found = load_file(tmp_path / NAME)
    assert set(found) == {*KEYS, "xxh3_128"}
    for key, vector in shard[0].vectors.items():
        assert np.array_equal(found[key], vector)
    assert (tmp_path / NAME).stat().st_size == shard[0].num_bytes


def test_a_part_of_a_file_is_read_without_the_rest_of_it(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], reader: PieceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    read = os.preadv

    def counting(descriptor: int, buffers: Any, position: int) -> int:
        seen.append((position, read(descriptor, buffers, position)))
        return seen[-1][1]

    monkeypatch.setattr(os, "preadv", counting)
    file = ShardFile(tmp_path, shard[1], reader)
    target = np.empty(10, np.float32)
    file.read("state.exp_avg", SIZE - 10, target)
    file.read("state.exp_avg", SIZE - 20, target)
    file.close()
    assert np.array_equal(target, shard[0].vectors["state.exp_avg"][-20:-10])
    (table, last) = seen
    assert table == (shard[0].data_stop, 2 * SUM_BYTES)
    assert last[0] == CHUNK_BYTES, "the last chunk, once"
    assert shard[0].data_stop <= sum(last) <= shard[0].num_bytes


@pytest.mark.parametrize("position", [0, 5000, CHUNK_BYTES - 1, CHUNK_BYTES, -1])
def test_a_flipped_bit_anywhere_is_found_where_it_is_read(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], reader: PieceReader, position: int
) -> None:
    content = bytearray((tmp_path / NAME).read_bytes())
    content[position] ^= 1
    (tmp_path / NAME).write_bytes(content)
    target = np.empty(SIZE, np.float32)
    with pytest.raises(DamagedError, match=f"{NAME} is damaged: (bytes|its table)"):
        file = ShardFile(tmp_path, shard[1], reader)
        for key in KEYS:
            file.read(key, 0, target)


def test_a_damaged_chunk_is_named_and_what_was_read_before_is_not_taken_from_it(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], reader: PieceReader
) -> None:
    content = bytearray((tmp_path / NAME).read_bytes())
    content[CHUNK_BYTES + 5000] ^= 1
    (tmp_path / NAME).write_bytes(content)
    file = ShardFile(tmp_path, shard[1], reader)
    target, whole = np.empty(10, np.float32), np.empty(SIZE, np.float32)
    for place, into in [(0, whole), (SIZE - 10, target)]:  # both chunks at once, then the second alone
        with pytest.raises(DamagedError, match=f"bytes {CHUNK_BYTES} to {shard[0].data_stop} are not"):
            file.read("state.exp_avg", place, into)
        file.read("weights", 5, target)
        assert np.array_equal(target, shard[0].vectors["weights"][5:15])
    file.close()


def test_more_than_the_buffer_holds_is_read_piece_by_piece(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]]
) -> None:
    with PieceReader(CHUNK_BYTES) as reader:
        file = ShardFile(tmp_path, shard[1], reader)
        for key in ("weights", "state.exp_avg", "weights"):
            target = np.empty(SIZE, np.float32)
            file.read(key, 0, target)
            assert np.array_equal(target, shard[0].vectors[key])
        file.close()


def test_what_is_asked_for_next_is_read_while_this_is_checked(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second piece comes while the first one is summed, and only pieces that are wanted."""
    second, seen = threading.Event(), list[int]()
    read = os.preadv

    def noting(descriptor: int, buffers: Any, position: int) -> int:
        seen.append(position)
        if position == CHUNK_BYTES:
            second.set()
        return read(descriptor, buffers, position)

    def waiting(content: Any) -> Any:
        assert second.wait(60)
        return chunk_sums(content)

    monkeypatch.setattr(os, "preadv", noting)
    monkeypatch.setattr(reading, "chunk_sums", waiting)
    with PieceReader(CHUNK_BYTES) as reader:
        file = ShardFile(tmp_path, shard[1], reader)
        target = np.empty(SIZE, np.float32)
        file.read("state.exp_avg", 0, target)
        file.close()
    assert np.array_equal(target, shard[0].vectors["state.exp_avg"])
    assert {position for position in seen if position % CHUNK_BYTES == 0} == {0, CHUNK_BYTES}


@pytest.mark.parametrize("length", [0, 4095, CHUNK_BYTES, -40, -1])
def test_a_file_that_is_too_short_is_found(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], reader: PieceReader, length: int
) -> None:
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:length])
    with pytest.raises(DamagedError, match=f"{NAME} is damaged: it ends after"):
        ShardFile(tmp_path, shard[1], reader)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_file_system_that_refuses_to_go_past_the_cache_gets_the_same_file(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """Some refuse when the flag is set, some when the first bytes come, all where a file's end is no whole block."""
    if refuses:
        monkeypatch.setattr(transfer, "_DIRECT", 0)
    flags: list[int] = []
    write = os.write

    def picky(descriptor: int, content: Any) -> int:
        flags.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if flags[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", picky)
    (tmp_path / "again").mkdir()
    assert shard[0].write(tmp_path / "again" / NAME) == shard[1]["checksum"]
    assert (tmp_path / "again" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    assert sum(map(bool, flags)) <= 1, "asked once"


def test_invalid_arguments_that_the_cache_is_not_to_blame_for_are_told(
    tmp_path: Path, shard: tuple[ShardImage, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalid(descriptor: int, content: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "write", invalid)
    with pytest.raises(OSError, match="Invalid argument"):
        shard[0].write(tmp_path / NAME)


def test_memory_for_transfers_begins_at_a_page_and_is_zero() -> None:
    for size in (0, 1, 5000, 3 << 20):
        memory = pages(size, for_transfer=True)
        assert memory.shape == (size,)
        assert memory.ctypes.data % transfer.BLOCK_BYTES == 0 or size == 0
        assert not memory.any()


def test_the_newest_is_read_though_those_that_were_listed_have_been_removed(tmp_path: Path) -> None:
    """As by a training that goes on in that folder, with keep_last=1."""
    folder = tmp_path / "checkpoints"
    made(folder / "epoch-000001", "whole")
    seen = []

    def read(path: Path) -> str:
        seen.append(path.name)
        if len(seen) == 1:
            made(folder / "epoch-000002", "whole")
            files.discard(path)
            raise DamagedError(f"{path} cannot be read: it is gone")
        return path.name

    assert weights._read_newest(tmp_path, read) == (folder / "epoch-000002", "epoch-000002")
    assert seen == ["epoch-000001", "epoch-000002"]


pieces = st.lists(st.integers(0, 60), min_size=2, max_size=12, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)


@given(pieces, pieces, st.integers(0, 3))
def test_what_a_file_and_a_wish_share_is_found_element_by_element(
    runs: list[Piece], pieces: list[Piece], gap: int
) -> None:
    held = [element for run in runs for element in range(*run)]
    wish: dict[int, int] = {}
    wanted, target = [], 0
    for piece in pieces:
        wanted.append(Wanted(piece, target))
        wish.update({target + i: element for i, element in enumerate(range(*piece))})
        target += piece[1] - piece[0] + gap
    found: dict[int, int] = {}
    for place, first, number in overlaps(runs, wanted):
        for i in range(number):
            assert first + i not in found
            found[first + i] = held[place + i]
    assert found == {at: element for at, element in wish.items() if element in held}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), pieces, st.integers(1, 50))
def test_gaps_are_left_out_whatever_pieces_a_shard_comes_in(sizes: list[int], runs: list[Piece], step: int) -> None:
    layout = FlatLayout.of((str(index), (size,)) for index, size in enumerate(sizes))
    runs = [(min(start, layout.size), min(stop, layout.size)) for start, stop in runs]
    runs = [run for run in runs if run[0] < run[1]]
    whole = np.arange(layout.size, dtype=np.float32)
    inside = np.concatenate([whole[:0], *(whole[slot.offset : slot.stop] for slot in layout.slots)])
    shard = np.concatenate([whole[:0], *(whole[start:stop] for start, stop in runs)])
    made = Compaction(layout, runs)
    target = np.full(made.size, -1, np.float32)
    for start in range(0, shard.size, step):
        made.copy(start, shard[start : start + step], target)
    assert np.array_equal(target, shard[np.isin(shard, inside)])


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (Keep(), []),
        (Keep(last=1), [1, 2, 3, 4, 5]),
        (Keep(last=4), [1, 2]),
        (Keep(last=9), []),
        (Keep(last=2, every=2), [1, 3]),
        (Keep(last=1, every=5), [1, 2, 3, 4]),
    ],
)
def test_the_newest_and_every_so_many_th_stay(keep: Keep, gone: list[int]) -> None:
    numbers = {(0, 10 * number): number for number in range(1, 7)}
    assert keep.gone(numbers, (0, 60)) == [(0, 10 * number) for number in gone]


@given(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 4)), st.integers(1, 20), st.integers(1, 20))
def test_the_one_just_written_never_goes(last: int, every: int | None, total: int, written: int) -> None:
    numbers = {(number, 0): number for number in range(1, total + 1)}
    at = (min(written, total), 0)
    gone = Keep(last, every).gone(numbers, at)
    assert at not in gone
    assert all(position < at for position in gone), "what is behind it was damaged when the run resumed"


def made(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(text)
    return path


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_crash_at_any_moment_of_replacing_leaves_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Everything that changes the directory is counted; nothing happens from the given one on, as after a power cut."""
    final, temporary = made(tmp_path / "epoch-000001", "old"), made(tmp_path / ".new-epoch-000001", "new")
    done = 0

    class Crash(BaseException):
        pass

    def stopping(action: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= fails_at:
                raise Crash
            return action(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", stopping(files.sync))
        patch.setattr(files, "remove", stopping(files.remove))
        patch.setattr(pathlib.Path, "rename", stopping(pathlib.Path.rename))
        try:
            files.publish(temporary, final)
        except Crash:
            pass
    files.clear_left_overs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-000001"]
    assert (final / MANIFEST).read_text() in ("old", "new")
    assert files.list_in(tmp_path) == [((1, 0), final)]


def test_a_removed_one_is_gone_at_once_and_what_is_left_of_it_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "epoch-000001", "whole")
    with monkeypatch.context() as patch:
        patch.setattr("mpidl.checkpoint.files.shutil.rmtree", lambda path, **options: None)
        files.discard(path)
    assert files.list_in(tmp_path) == []
    files.clear_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["", "cannot write /x: No space left on device", "ä" * REPORT_BYTES])
def test_reports_of_any_text_have_one_size(error: str) -> None:
    report = Report("ab" * SUM_BYTES, 2**40, error)
    encoded = report.encode()
    assert encoded.shape == (REPORT_BYTES,)
    found = Report.decode(encoded)
    assert (found.checksum, found.num_bytes) == (report.checksum, report.num_bytes)
    assert found.error[:400] == error[:400]
    assert Report.decode(Report().encode()) == Report()


def test_nothing_that_reads_checkpoints_can_unpickle() -> None:
    package = Path(mpidl.__file__).parent
    for path in [*(package / "checkpoint").glob("*.py"), package / "progress.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom | ast.Name) else ""
            assert not {"torch.load", "np.load", "eval", "exec", "pickle"} & {text, *text.split()}, f"{path}: {text}"


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


def test_a_stranger_s_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights(tmp_path / "weights.safetensors")
    assert not (tmp_path / "evil").exists()
