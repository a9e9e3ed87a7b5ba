"""The last starts of groups in files of each node's memory, for a training that `mpidl launch` starts again.

It is what `memory.py` keeps, in the same slots and at the same moments; only that the slots lie in files with names, in
a private folder of /dev/shm (`local_folder.py`), which are there when all ranks have ended. A start that was kept is
mostly newer than the newest checkpoint, and costs no disk.

*Who owns what.* Each set of slots (`slots.Store`) is a *series*, named by a random word. Of each series each rank has a
file `SERIES-RANK.own` with its two slots on its node and, where there are several nodes, its buddy on the next one has
`SERIES-RANK.copy`. Only the rank, and its buddy, write them. The first rank of each node writes what is the same on all
ranks (position, buffers) into `SERIES-SLOT.common`, one file for each of the two slots.

*When a file is complete.* An image file begins with a header (key of the launch, series, rank and number of ranks, the
layout's digest, the shard's runs, the vectors' names; with a checksum), written when the file is made and never
changed. A slot counts where its iteration is set, and its checksum, which are written last, fits what it holds. A
common file has a checksum too, and is written over the one before last. Of a *whole* start of a group every rank's slot
of one series has the iteration, owner's or buddy's, and so has a common file of the series, on some node.

*At the next start* each rank looks into the folder of its node; all tell each other what is there, and take the newest
whole start that is newer than the newest checkpoint. Of each image one rank that has it reads a copy, which it checks;
where one does not fit, all choose again without it, so all end with the same choice. Then shards are dealt out as after
a loss (`memory.Found`), on any number of ranks: everyone receives every image, and takes what it needs of it.

*What if.* A rank is killed: at any moment the older of the two newest starts is whole on the nodes that live, for the
reason that `memory.py` gives; while the first one of a new series is written it is one of the series before, whose
files are removed only when all ranks have completed a start of the new one. Ranks of the start before that still live
cannot harm: a series is written by the start that made it, and who reads takes a copy before it checks. A node is lost:
its ranks' images are with their buddies. A node and the next one: the checkpoint has to do. Nodes come back with what
they had: a series of ranks that are not all there is not whole, and a start of it that is has the same bits. The
machine goes down: files in memory are gone. There is no room: all ranks go without, and one says so. One file cannot be
written later on: this start is not whole, and the one before is.

*Whom to trust.* The folder has to be a directory of this user that nobody else may enter, files in it ordinary ones of
this user that are as long as their header says. What is not, and what has another launch's key, is not taken. The sums
find damage; they do not prove who wrote a file, which the folder's owner does.

*What is left behind.* Nothing, where ranks end well or stop with a checkpoint. What killed ranks leave is removed by
`mpidl launch` at its end, or replaced by the next training in the same run directory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialised
from safetensors.torch import save as serialised

from mpidl import local_folder
from mpidl.checkpoint.local_choice import Choice, Held, Place, choose, covers, newest
from mpidl.checkpoint.local_format import (
    COMMON,
    IMAGE,
    Bytes,
    Common,
    Header,
    UnfitError,
    create,
    decode_common,
    encode_common,
    image_name,
    open_file,
    open_folder,
    read_header,
    read_slot,
)
from mpidl.checkpoint.publication import draft
from mpidl.checkpoint.reading import check_fits
from mpidl.checkpoint.slots import NUM_SLOTS, NUMBERS_BYTES, Slot
from mpidl.checkpoint.snapshot import rest_of
from mpidl.checkpoint.transfer import checksum
from mpidl.errors import MALFORMED, ConfigError
from mpidl.parameters import ParameterManager
from mpidl.parameters.layout import Piece
from mpidl.runtime import SharedMemoryError, World, on_all_ranks, warn

UNKEPT = (SafetensorError, RuntimeError, NotImplementedError, TypeError, ValueError)
"""What values raise that no file takes: then there is none, and training goes on."""


class Images:
    """The images of a start, as `memory.Found` reads them.

    Args:
        runs: by rank of then, its shard.
        own: those that this rank has read.
        common: what is the same on all ranks.
    """

    def __init__(self, runs: Sequence[Sequence[Piece]], own: Mapping[int, Slot], common: Common) -> None:
        self.runs = [list(each) for each in runs]
        self._own, self._common = own, common

    def image(self, rank: int, iteration: int) -> Slot | None:
        """A rank's, where this one has read it."""
        return self._own.get(rank)

    def state(self, iteration: int) -> tuple[Any, dict[str, torch.Tensor], list[str] | None]:
        """As `Memory.state`."""
        return self._common.state, deserialised(self._common.buffers), self._common.travelling


class LocalFiles:
    """The files of this rank's node. Construction is collective.

    Args:
        world: all ranks.
        announced: the folder and the key.
        manager: whose state.

    Raises:
        SharedMemoryError: on every rank: some node has no such folder.
    """

    def __init__(self, world: World, announced: local_folder.Announced, manager: ParameterManager) -> None:
        self._world, self._manager, self._key = world, manager, announced.key
        self._layout = manager.layout.digest()
        self._name, self._path = announced.name, local_folder.DIRECTORY / announced.name
        self._is_first = world.local_rank == 0
        self._fixed: dict[str, Any] | None = None
        """What is written; a checkpoint that is loaded after this may bring other frozen parameters."""
        self._as_built: dict[str, Any] = {}
        self._has_failed = False
        self._found: dict[Place, list[tuple[str, int]]] = {}
        """Where the images are that this rank can read: file and slot."""
        self._commons: dict[tuple[str, int], str] = {}
        failure = ""
        try:
            self._as_built = describe_fixed(manager)
            self._folder = open_folder(announced.name)
        except OSError as error:
            failure = f"{self._path} on {world.hostname}: {error.strerror}"
        except UNKEPT as error:
            failure = f"the model has what cannot be kept: {error}"
        _agree(world, failure)

    def clear(self, *, only_of_others: bool) -> None:
        """Remove what is there of other launches, or all. Collective."""
        if self._is_first:
            for name in self._names():
                if not (only_of_others and self._is_own(name)):
                    self._unlink(name)
        self._world.barrier()

    def close(self) -> None:
        """Remove all, as nobody needs it any more. Collective."""
        if self._is_first:
            local_folder.remove(self._name)
        self._world.barrier()
        os.close(self._folder)

    # --- writing ----------------------------------------------------------------------------------------------------

    def share(
        self, series: str, keys: Sequence[str], runs: Sequence[Sequence[Piece]], head_bytes: int, wards: Sequence[int]
    ) -> tuple[list[Bytes], list[Bytes]]:
        """Make the files of a series. Collective.

        Args:
            series: a new one.
            keys: of the vectors.
            runs: of each rank's shard.
            head_bytes: of a slot.
            wards: the ranks that this one is the buddy of.

        Returns:
            The slots of this node's ranks, and those of the wards.

        Raises:
            SharedMemoryError: on every rank: some node has no room.
        """
        headers = {
            rank: Header(
                self._key, series, rank, self._world.size, self._layout, tuple(keys), tuple(runs[rank]), head_bytes
            )
            for rank in (self._world.rank, *wards)
        }
        with contextlib.suppress(SharedMemoryError):
            return self._share(series, headers)
        self.keep_only([])  # what the start before has left takes room; the checkpoint has to do until the next one
        self._world.barrier()
        return self._share(series, headers)

    def _share(self, series: str, headers: Mapping[int, Header]) -> tuple[list[Bytes], list[Bytes]]:
        world, made, failure = self._world, dict[int, Bytes](), ""
        own = world.rank
        try:
            for rank, header in headers.items():
                name = image_name(series, rank, is_own=rank == own)
                made[rank] = create(self._folder, name, header.encode(), NUM_SLOTS * header.slot_bytes)
                for slot in made[rank].reshape(NUM_SLOTS, header.slot_bytes):
                    Slot(slot, header.keys, header.size, header.head_bytes).open()
        except OSError as error:
            megabytes = sum(NUM_SLOTS * each.slot_bytes for each in headers.values()) / 2**20
            failure = f"{megabytes:.0f} MiB in {local_folder.DIRECTORY} on {world.hostname}: {error.strerror}"
        neighbours, failure = self._map_neighbours(series, made.get(own), failure)
        try:
            _agree(world, failure)
        except SharedMemoryError:
            for rank in made:
                self._unlink(image_name(series, rank, is_own=rank == own))
            raise
        return neighbours, [made[rank] for rank in headers if rank != own]

    def _map_neighbours(self, series: str, own: Bytes | None, failure: str) -> tuple[list[Bytes], str]:
        """The slots of all ranks of this node, or what went wrong. Collective on the node."""
        world, segments = self._world, list[Bytes]()
        failure = next(filter(None, world.node_allgather_object(failure)), "")
        first = world.first_rank_of(world.node)
        for rank in range(first, first + world.local_size) if not failure else ():
            if rank == world.rank and own is not None:
                segments.append(own)
                continue
            try:
                descriptor, num_bytes = open_file(self._folder, image_name(series, rank, is_own=True), os.O_RDWR)
                try:
                    _, start = read_header(descriptor, num_bytes)
                    segments.append(np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)[start:])
                finally:
                    os.close(descriptor)
            except (OSError, UnfitError, *MALFORMED) as error:
                failure = f"a neighbour's file in {local_folder.DIRECTORY} on {world.hostname}: {error}"
        return segments, failure

    def write_common(
        self,
        series: str,
        number: int,
        iteration: int,
        state: dict[str, Any],
        buffers: Mapping[str, torch.Tensor],
        travelling: list[str] | None,
    ) -> None:
        """Write what is the same on all ranks, on the first one of each node; a full disk is told once."""
        if not self._is_first:
            return
        name = f"{series}-{number}.common"
        try:
            tensors = {
                key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in buffers.items()
            }
            self._fixed = self._fixed or describe_fixed(self._manager)
            common = Common(series, iteration, state, self._fixed, travelling, serialised(tensors))
            content = encode_common(self._key, common)
            descriptor = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600, dir_fd=self._folder)
            with open(descriptor, "wb") as file:  # in the place of an older one, as the memory may be full
                file.write(content)
                file.truncate()
        except (OSError, *UNKEPT) as error:
            if not self._has_failed:
                self._has_failed = True
                warn(f"{self._path} cannot be written ({error}); a restart may lose more")

    def keep_only(self, series: Iterable[str]) -> None:
        """Remove the files of this launch but for those of some series; the first rank of a node does it."""
        kept = set(series)
        if self._is_first:
            for name in self._names():
                if name.partition("-")[0] not in kept:
                    self._unlink(name)

    # --- reading ----------------------------------------------------------------------------------------------------

    def find(self, newer_than: int, fits: Callable[[dict[str, Any]], bool]) -> tuple[Choice, Images] | str:
        """The newest whole start, read and checked, or why there is none. Collective.

        Args:
            newer_than: iterations of the newest checkpoint.
            fits: whether a state, as `Memory.keep` was given it, is one of this training.
        """
        told: list[Held] = self._world.allgather_object(self._look())
        seen = newest(told)
        if seen is None:
            return "nothing is kept on the nodes"
        total = sum(slot.size for slot in self._manager.layout.slots)
        while (choice := choose(told, newer_than)) is not None:
            own, common, failed = self._read(choice, fits)
            shards = {rank: (header.runs, header.keys) for rank, (header, _) in own.items()}
            answers = self._world.allgather_object((failed, shards))
            for now, (lacking, _) in enumerate(answers):
                told[now].images -= lacking.images
                told[now].commons -= lacking.commons
            if any(lacking.images or lacking.commons for lacking, _ in answers):
                continue
            all_shards = {rank: shard for _, each in answers for rank, shard in each.items()}
            runs = [all_shards[rank][0] for rank in range(len(choice.holders))]
            if len({keys for _, keys in all_shards.values()}) == 1 and covers(runs, total):
                common = self._world.broadcast_object(common, root=choice.common)
                assert common is not None, "who has it has checked it"
                return choice, Images(runs, {rank: slot for rank, (_, slot) in own.items()}, common)
            for held in told:
                held.commons.discard((choice.series, choice.iteration))
        if seen <= newer_than:
            return f"what is kept on the nodes is not newer, of iteration {seen}"
        return f"of what was kept on the nodes, up to iteration {seen}, no newer start is whole and fits"

    def _look(self) -> Held:
        """What is in the folder, by headers only."""
        held = Held()
        for name in self._names():
            with contextlib.suppress(OSError, UnfitError, *MALFORMED):
                if IMAGE.fullmatch(name):
                    for place, number, size in self._look_into(name):
                        held.images.add(place)
                        held.sizes[place[0]] = size
                        self._found.setdefault(place, []).append((name, number))
                elif COMMON.fullmatch(name):
                    common = self._read_common(name)
                    held.commons.add((common.series, common.iteration))
                    self._commons[common.series, common.iteration] = name
        return held

    def _look_into(self, name: str) -> Iterator[tuple[Place, int, int]]:
        """Of an image file: (image, slot, number of ranks)."""
        descriptor, header, start = self._open_image(name)
        try:
            for number in range(NUM_SLOTS):
                numbers = np.frombuffer(
                    os.pread(descriptor, NUMBERS_BYTES, start + number * header.slot_bytes), np.int64
                )
                if numbers[0] >= 0:
                    yield (header.series, header.rank, int(numbers[0])), number, header.world_size
        finally:
            os.close(descriptor)

    def _open_image(self, name: str) -> tuple[int, Header, int]:
        """Descriptor, header, and where slots begin, of an image file of this launch and model."""
        descriptor, num_bytes = open_file(self._folder, name)
        try:
            header, start = read_header(descriptor, num_bytes)
            match = IMAGE.fullmatch(name)
            if header.key != self._key or header.layout != self._layout or match is None:
                raise UnfitError("another launch or model")
            if (header.series, header.rank) != (match[1], int(match[2])):
                raise UnfitError("another name")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, header, start

    def _read_common(self, name: str) -> Common:
        descriptor, num_bytes = open_file(self._folder, name)
        with open(descriptor, "rb") as file:
            return decode_common(self._key, file.read(num_bytes))

    def _read(
        self, choice: Choice, fits: Callable[[dict[str, Any]], bool]
    ) -> tuple[dict[int, tuple[Header, Slot]], Common | None, Held]:
        """This rank's part of a start: images, the common file, and what of it is not sound."""
        own, failed, common = dict[int, tuple[Header, Slot]](), Held(), None
        for rank, holder in enumerate(choice.holders):
            place = (choice.series, rank, choice.iteration)
            if holder == self._world.rank:
                found = self._read_image(place)
                if found is None:
                    failed.images.add(place)
                else:
                    own[rank] = found
        if choice.common == self._world.rank:
            start = choice.series, choice.iteration
            with contextlib.suppress(OSError, UnfitError, ConfigError, *UNKEPT, *MALFORMED):
                found_common = self._read_common(self._commons[start])
                if self._is_fit(found_common) and fits(found_common.state):
                    common = found_common
            if common is None:
                failed.commons.add(start)
        return own, common, failed

    def _read_image(self, place: Place) -> tuple[Header, Slot] | None:
        for name, number in self._found[place]:
            with contextlib.suppress(OSError, UnfitError, *MALFORMED):
                descriptor, header, start = self._open_image(name)
                try:
                    slot = read_slot(descriptor, header, start, number)
                finally:
                    os.close(descriptor)
                if slot.iteration == place[2] and isinstance(slot.scalars(), list):
                    return header, slot
        return None

    def _is_fit(self, common: Common) -> bool:
        """Whether the state is of this model and optimizer."""
        check_fits(self._manager, self._path, common.fixed)
        own = self._as_built
        values, found = self._manager.buffer_values(), deserialised(common.buffers)
        kinds, found_kinds = (
            {name: (value.shape, value.dtype) for name, value in each.items()} for each in (values, found)
        )
        return own["frozen"] == common.fixed["frozen"] and kinds == found_kinds

    def _names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return sorted(entry.name for entry in entries)
        except OSError:
            return []

    def _is_own(self, name: str) -> bool:
        """Whether a file is one of this launch, as far as its header tells."""
        with contextlib.suppress(OSError, UnfitError, *MALFORMED):
            if COMMON.fullmatch(name):
                self._read_common(name)
                return True
            descriptor, num_bytes = open_file(self._folder, name)
            try:
                return read_header(descriptor, num_bytes)[0].key == self._key
            finally:
                os.close(descriptor)
        return False

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder)


def _agree(world: World, failure: str) -> None:
    """Raise on all ranks where one has failed. Collective."""
    failures = [text for text in world.allgather_object(failure) if text]
    if failures:
        raise on_all_ranks(SharedMemoryError(failures[0]))


def describe_fixed(manager: ParameterManager) -> dict[str, Any]:
    """What has to be the same where state of `manager` is taken, as JSON has it: model, optimizer, frozen parameters.

    Frozen parameters are not kept: where the model is not made with the same ones again, nothing is taken.
    """
    made = draft(manager, {}, [], {})
    frozen = rest_of(manager)[0]
    for name in manager.buffer_values():
        frozen.pop(name, None)
    content = b"".join(
        checksum(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in frozen.values()
    )
    sums = {"names": list(frozen), "sum": checksum(np.frombuffer(content, np.uint8)).hex()}
    kept = {name: made[name] for name in ("layout", "tensors", "optimizer")}
    fixed: dict[str, Any] = json.loads(json.dumps({**kept, "frozen": sums}))
    return fixed
