"""Reading checkpoints, on any number of ranks: each rank reads, and checks, the chunks that hold what it needs.

Nothing of a checkpoint reaches model or optimizer before all ranks have read and checked their parts, so a damaged one
changes nothing and an older one can be tried. What is damaged is a `DamagedError`; where it is whole and does
not fit this model, optimizer or run, the settings are to blame: a `ConfigError`.

Nothing is unpickled: numbers are taken as numbers, from the places that the manifest names.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as deserialised

from mpidl.checkpoint.image import CHUNK_BYTES, chunk_sums, table_bytes
from mpidl.checkpoint.manifest import read_manifest
from mpidl.checkpoint.publication import plain_options
from mpidl.checkpoint.snapshot import rest_of
from mpidl.checkpoint.transfer import PIECE_BYTES, SUM_BYTES, Bytes, checksum, go_direct, pages, read_at
from mpidl.errors import ConfigError, DamagedError
from mpidl.parameters import ParameterManager
from mpidl.parameters.layout import Piece
from mpidl.parameters.state import group_options

Float32Array = NDArray[np.float32]


class PieceReader:
    """Reads pieces of files into two buffers in turn: while one is checked and copied, a thread fills the other.

    Args:
        piece_bytes: the most that is read at a time; a multiple of CHUNK_BYTES.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES // 2) -> None:
        self.piece_bytes = piece_bytes
        self._buffers = [pages(piece_bytes, for_transfer=True) for _ in range(2)]
        """The first holds what was read last, the second is the thread's."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mpidl-reading")
        self._coming: tuple[tuple[int, int, int], concurrent.futures.Future[int]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()
        self._thread.shutdown()

    def read(self, descriptor: int, position: int, size: int) -> tuple[Bytes, int]:
        """A piece of a file, and how many of its bytes there are; it stays until the next call.

        Raises:
            OSError: it cannot be read.
        """
        piece = (descriptor, position, size)
        if self._coming is None or self._coming[0] != piece:
            self.ahead(*piece)
        assert self._coming is not None
        (_, future), self._coming = self._coming, None
        found = future.result()
        self._buffers.reverse()
        return self._buffers[0][:size], found

    def ahead(self, descriptor: int, position: int, size: int) -> None:
        """Begin to read what is asked for next; what was begun before is let go."""
        self.forget()
        future = self._thread.submit(read_at, descriptor, position, self._buffers[1], size)
        self._coming = ((descriptor, position, size), future)

    def forget(self) -> None:
        """Wait until nothing is read."""
        if self._coming is not None:
            concurrent.futures.wait([self._coming[1]])
            self._coming = None


class ShardFile:
    """A shard's file, of which elements can be read.

    Args:
        path: the checkpoint.
        entry: the file's in the manifest.
        reader: what is read passes through its buffers.

    Raises:
        DamagedError: the file is not there, too short, or its table of sums is not what was written.
    """

    def __init__(self, path: pathlib.Path, entry: Mapping[str, Any], reader: PieceReader) -> None:
        self.path = path / entry["file"]
        self._places = {key: index for index, key in enumerate(entry["vectors"])}
        self._size = num_elements(entry)
        self._data_start = int(entry["data_start"])
        self._data_stop = self._data_start + 4 * self._size * len(self._places)
        self._reader = reader
        self._content: Bytes = np.empty(0, np.uint8)
        self._start = 0
        """The file's bytes from here on are in `_content`, checked."""
        check_length(self.path, self._data_stop + table_bytes(self._data_stop))
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror}") from None
        try:
            self._table = self._read_table()
            if checksum(self._table).hex() != entry["checksum"]:
                raise DamagedError(f"{self.path} is damaged: its table of sums is not what the manifest says")
            go_direct(self._descriptor)
        except DamagedError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._reader.forget()
        os.close(self._descriptor)

    def read(self, key: str, place: int, target: Float32Array) -> None:
        """Read `target.size` elements of a vector, from its element `place` on.

        Raises:
            DamagedError: a chunk that they lie in is not what was written, or cannot be read.
        """
        left = target.view(np.uint8)
        position = self._data_start + 4 * (self._places[key] * self._size + place)
        while left.size:
            if not self._start <= position < self._start + self._content.size:
                self._take(position, position + left.size)
            found = self._content[position - self._start :][: left.size]
            left[: found.size] = found
            position, left = position + found.size, left[found.size :]

    def _take(self, position: int, stop: int) -> None:
        """Have the chunks that hold bytes [position, stop) of the file, or as many as there is room for."""
        start = position // CHUNK_BYTES * CHUNK_BYTES
        size = self._piece_size(start, stop)
        self._content = self._content[:0]  # until it is known to be right
        with self._damage():
            content, found = self._reader.read(self._descriptor, start, size)
        self._check_whole(start, found, size)
        if start + size < stop:
            self._reader.ahead(self._descriptor, start + size, self._piece_size(start + size, stop))
        expected = self._table[table_bytes(start) :]
        sums = chunk_sums(content)
        (wrong,) = np.nonzero(sums != expected[: sums.size])
        if wrong.size:
            damaged = start + int(wrong[0]) // SUM_BYTES * CHUNK_BYTES
            end = min(damaged + CHUNK_BYTES, self._data_stop)
            raise DamagedError(f"{self.path} is damaged: bytes {damaged} to {end} are not those that were written")
        self._start, self._content = start, content

    def _piece_size(self, start: int, stop: int) -> int:
        """Of what is read at once: whole chunks, but for the file's end."""
        return min(-(-stop // CHUNK_BYTES) * CHUNK_BYTES, start + self._reader.piece_bytes, self._data_stop) - start

    def _read_table(self) -> Bytes:
        table: Bytes = np.empty(table_bytes(self._data_stop), np.uint8)
        with self._damage():
            found = read_at(self._descriptor, self._data_stop, table, table.size)
        self._check_whole(self._data_stop, found, table.size)
        return table

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """An error of the system's is a damaged file."""
        try:
            yield
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror}") from None

    def _check_whole(self, position: int, found: int, size: int) -> None:
        if found < size:
            raise DamagedError(f"{self.path} is damaged: it ends after {position + found} bytes")


def num_elements(entry: Mapping[str, Any]) -> int:
    """Of each of a shard's vectors."""
    return sum(stop - start for start, stop in entry["runs"])


def check_length(file: pathlib.Path, num_bytes: int) -> None:
    """Raise DamagedError unless a file is there, an ordinary one, and at least so long."""
    try:
        found = file.stat()
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{file} cannot be read: it is not a file")  # opening a pipe would wait for ever
    if found.st_size < num_bytes:
        raise DamagedError(f"{file} is damaged: it ends after {found.st_size} bytes of {num_bytes}")


def load(manager: ParameterManager, path: pathlib.Path) -> dict[str, Any]:
    """Take weights, buffers and optimizer state from a checkpoint, written on any number of ranks. Collective.

    Returns:
        The training's position, as it was given to `save`.

    Raises:
        DamagedError: on every rank: it is not what was written; nothing was changed.
        ConfigError: on every rank: it is of another model or optimizer; nothing was changed.
    """
    world = manager.world.for_purpose("checkpoint")
    with world.agreed(f"loading {path}"):
        manifest = read_manifest(path)
        check_fits(manager, path, manifest)
    with world.agreed(f"loading {path}"):
        vectors = _read_own(manager, path, manifest)
        rest = _read_own_rest(manager, path, manifest)
    for tensor, value in rest:
        tensor.copy_(value)
    install(manager, vectors, manifest["optimizer"]["state"])
    for group, options in zip(manager.param_groups, manifest["optimizer"]["options"], strict=True):
        group["lr"] = options.get("lr", group["lr"])  # the other options are the same
    if manifest["buffers"] is not None:
        manager.settle_buffers(manifest["buffers"])
    progress: dict[str, Any] = manifest["progress"]
    return progress


def install(
    manager: ParameterManager, vectors: Mapping[str, Float32Array], scalars: Sequence[Mapping[str, Any]]
) -> None:
    """Give weights and optimizer their vectors; buffers have theirs already. Collective.

    Args:
        manager: whose.
        vectors: "weights", and "state." and the name of each element-wise state; float32, (shard size,).
        scalars: the rest of each param group's state.
    """
    manager.set_shard_weights(vectors["weights"])
    state = {key.removeprefix("state."): vector for key, vector in vectors.items() if key != "weights"}
    manager.shard_optimizer.load(state, scalars)


def check_fits(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Raise ConfigError unless what is said of model and optimizer is true of the manager's."""
    given = [(name, tuple(shape)) for name, shape in manifest["tensors"]]
    own = [(slot.name, slot.shape) for slot in manager.layout.slots]
    if given != own or manifest["layout"] != manager.layout.digest():
        raise ConfigError(f"{path} is of another model: {_first_difference(given, own)}")
    kind = type(manager.optimizer).__name__
    if manifest["optimizer"]["class"] != kind or len(manifest["optimizer"]["options"]) != len(manager.param_groups):
        raise ConfigError(
            f"{path} is of {manifest['optimizer']['class']} with {len(manifest['optimizer']['options'])} param "
            f"groups, this run has {kind} with {len(manager.param_groups)}"
        )
    _check_options(manager, path, manifest)


def _check_options(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """The optimizer's options must be those of the checkpoint; learning rates come with each plan."""
    for index, options in enumerate(group_options(manager.optimizer)):
        own = json.loads(json.dumps(plain_options(options)))
        for key, value in manifest["optimizer"]["options"][index].items():
            if key in own and own[key] != value and key not in ("lr", "initial_lr"):
                raise ConfigError(
                    f"{path} was written with {key} {value} in param group {index}, this run has {own[key]}; resume "
                    "with the same"
                )


def _first_difference(given: list[Any], own: list[Any]) -> str:
    for a, b in zip(given, own, strict=False):
        if a != b:
            return f"it has {a[0]} {a[1]} where this model has {b[0]} {b[1]}"
    return f"it has {len(given)} trained tensors, this model {len(own)}"


def _read_own(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Float32Array]:
    """This rank's part of every vector, float32, (shard size,), alignment gaps filled with zeros."""
    wanted, size = wanted_by(manager)
    return read_vectors(path, manifest, wanted, state_keys(manifest), size)


def wanted_by(manager: ParameterManager) -> tuple[list[Wanted], int]:
    """The pieces of each vector that are this rank's shard, and the shard's size with its gaps."""
    layout, wanted, offset = manager.layout, list[Wanted](), 0
    for run in manager.shard_runs:
        place = layout.unpadded(run)[0]
        for _, start, stop in layout.tensors_in(run):
            wanted.append(Wanted((place, place + stop - start), offset + start - run[0]))
            place += stop - start
        offset += run[1] - run[0]
    return wanted, offset


def state_keys(manifest: Mapping[str, Any]) -> list[str]:
    """The names of all vectors: the weights, and the state that any param group has."""
    arrays = {key for entry in manifest["optimizer"]["state"] for key in entry.get("arrays", [])}
    return ["weights", *(f"state.{key}" for key in sorted(arrays))]


class Wanted(NamedTuple):
    """A piece of a vector, and where it goes."""

    piece: Piece
    """Elements [start, stop) of the vector without gaps."""
    target: int
    """Where its first element goes in what is filled."""


def read_vectors(
    path: pathlib.Path, manifest: Mapping[str, Any], wanted: Sequence[Wanted], keys: Sequence[str], size: int
) -> dict[str, Float32Array]:
    """Pieces of vectors: key -> float32, (size,), zeros where nothing was wanted.

    Args:
        path: the checkpoint.
        manifest: its.
        wanted: ascending.
        keys: which vectors.
        size: of what is filled.

    Raises:
        DamagedError: a file that holds some of it is not what was written.
    """
    shards = [(entry, found) for entry in manifest["shards"] if (found := list(overlaps(entry["runs"], wanted)))]
    for entry, _ in shards:  # before there is memory for what they say that they hold
        check_length(path / entry["file"], 4 * len(entry["vectors"]) * num_elements(entry))
    vectors = {key: pages(4 * size).view(np.float32) for key in keys}
    with PieceReader() as reader:
        for entry, found in shards:
            with contextlib.closing(ShardFile(path, entry, reader)) as file:
                for key in keys:
                    if key not in entry["vectors"]:
                        raise DamagedError(f"{file.path} is damaged: it does not hold {key}")
                    for place, target, number in found:
                        file.read(key, place, vectors[key][target : target + number])
    return vectors


def overlaps(runs: Sequence[Piece], wanted: Sequence[Wanted]) -> Iterator[tuple[int, int, int]]:
    """(element of the file, where it goes, how many) of what a file's runs and wanted pieces share."""
    i = j = place = 0
    while i < len(runs) and j < len(wanted):
        piece, target = wanted[j]
        start, stop = max(runs[i][0], piece[0]), min(runs[i][1], piece[1])
        if start < stop:
            yield place + start - runs[i][0], target + start - piece[0], stop - start
        if runs[i][1] <= piece[1]:
            place += runs[i][1] - runs[i][0]
            i += 1
        else:
            j += 1


def _read_own_rest(
    manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor of the model, its value) of every buffer and frozen parameter."""
    own, found = rest_of(manager)[0], read_rest(path, manifest)
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise ConfigError(f"{path} holds {name} {tuple(value.shape)} {value.dtype}, which this model does not have")
    missing = sorted(own.keys() - found.keys())
    if missing:
        raise ConfigError(f"{path} does not hold {missing[0]}, which this model has; it is of another model")
    return [(own[name].detach(), value) for name, value in found.items()]


def read_rest(path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What is not trained, by name.

    Raises:
        DamagedError: its file is not what was written.
    """
    file = path / manifest["rest"]["file"]
    check_length(file, 0)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    if checksum(np.frombuffer(content, np.uint8)).hex() != manifest["rest"]["checksum"]:
        raise DamagedError(f"{file} is damaged: its checksum is not the manifest's")
    try:
        return dict(sorted(deserialised(content).items()))
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"{file} cannot be read: {error}") from None
