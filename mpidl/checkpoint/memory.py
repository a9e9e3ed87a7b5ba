"""A training's state as it was when a group began, kept in memory, for those who outlive a lost rank.

At the start of a group each rank copies its shard (weights and element-wise state) and the optimizer's scalars into a
*slot* (`slots.py`) that the other ranks of its node can read, also when it has died, and passes it on to its buddy on
the next node. What is the same on all ranks (buffers, progress) each keeps for itself. There are two slots: a group's
start is copied over that of the last but one. Others read them only after a loss, when their owner has died or has met
the others (`runtime/ulfm.py`).

- *now*: where the state itself can be read after a loss (`live.py`), that is newer than any start, and as good as one.
- *which*: a rank begins group k + 1 only when all have ended an iteration of group k, so of any two ranks one is at
  most one start ahead, and has passed on all before it: the older of the two newest starts is in a slot of every rank
  and with its buddy. It can be read of all unless a node and the next one are lost together, or the only one.
- *find*: those who live tell each other what they can read of whom, and take the newest start of which all know what is
  the same on all ranks, and of which somebody can read every rank's image of then.
- *restore*: everyone takes what belongs to its new shard from the images, as from a checkpoint's files; those of ranks
  on other nodes are broadcast by the lowest rank that can read them.

The first two starts are collective, as optimizers make their state in their first step: ranks agree on what vectors
there are and, where these are others than before, share new segments. Those before stay until the start after that; and
the memory of the world before the last loss stays until this one's second start, when every rank has completed the
first. So if one more rank is lost at any moment, what it takes is there.

Where `mpidl launch` would start the training again, the slots lie in files that outlive all ranks, and what is the same
on all ranks is written down beside them, once a node; which of them is found then, and how, is told in `local.py`.

The fourth start is timed. Where groups are so short that keeping all starts would take more than COST_SHARE of the
time, some are left out: the same ones on all ranks, by a clock that came with the gradients.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.checkpoint.live import Live, LiveImage
from mpidl.checkpoint.local import Images, LocalFiles
from mpidl.checkpoint.reading import Wanted, install, overlaps, wanted_by
from mpidl.checkpoint.slots import NONE, NUM_SLOTS, Slot, Store
from mpidl.checkpoint.snapshot import Compaction
from mpidl.parameters import ParameterManager
from mpidl.parameters.layout import Piece, merge_pieces
from mpidl.parameters.state import merge_scalars
from mpidl.runtime import SharedMemoryError, World, warn

Float32Array = NDArray[np.float32]

_COLLECTIVE = 2
"""In so many starts ranks agree on what there is to keep."""
_TIMED = 4
"""In this one, on what it takes: the first time that a slot is overwritten."""
COST_SHARE = 0.01
"""Of the time, for keeping: starts that come too soon are left out."""


class Memory:
    """The states of one manager's training at the last starts of groups.

    Args:
        manager: whose weights, buffers and optimizer.
        world: all ranks, with their nodes.
        before: of the world before the last loss; kept until this one's own are complete.
        files: where it is to outlive all ranks; None: it need not.
        survives: whether some ranks may go on where others are lost: then the state itself is to be readable too.
    """

    def __init__(
        self,
        manager: ParameterManager,
        world: World,
        before: Memory | None = None,
        files: LocalFiles | None = None,
        *,
        survives: bool = True,
    ) -> None:
        self.before = before
        self.generation: int = 0 if before is None else before.generation + 1
        """Of the worlds of a job, which one's it is."""
        self._manager: ParameterManager | None = manager
        self._world, self._files = world, files
        self._compaction = Compaction(manager.layout, manager.shard_runs)
        self.runs = [_unpadded(manager, manager.runs_of(rank)) for rank in range(world.size)]
        """Each rank's shard: elements [start, stop) of the vector without gaps."""
        self._stores: list[Store] = []
        self._survives = survives
        self._live: Live | None = None
        self._num_kept = 0
        self._own: dict[int, tuple[Any, dict[str, torch.Tensor], list[str] | None]] = {}
        """What is the same on all ranks, by iteration."""
        self._has_room = True
        self._kept_at, self._interval_s = 0.0, 0.0

    def keep(self, iteration: int, state: Any, now: float) -> None:
        """Keep what there is now, where it is time; weights are complete. Collective the first times.

        Args:
            iteration: iterations that are done, more than the last time.
            state: what else is needed to go on, JSON values; the same on all ranks, and nobody changes it.
            now: seconds of a clock that is the same on all ranks.
        """
        if not self._has_room or 0 <= now - self._kept_at < self._interval_s:
            return
        began, self._kept_at = time.perf_counter(), now
        assert self._manager is not None, "frozen"
        scalars = self._manager.shard_optimizer.scalars()
        self._num_kept += 1
        if self._num_kept > 1:
            self.before = None
        if self._num_kept > _COLLECTIVE:
            del self._stores[:-1]
        if self._files is not None and 1 < self._num_kept <= _COLLECTIVE + 1 and self._stores:
            self._files.keep_only([self._stores[-1].series])  # a start of it is complete on all ranks
        if self._num_kept <= _COLLECTIVE:
            self._arrange(scalars, iteration)
        if self._stores:
            self._write(self._manager, iteration, state, scalars)
            self._stores[-1].pass_on(self._num_kept % NUM_SLOTS)
        if self._num_kept == _TIMED:
            cost_s = self._world.allreduce(np.array([time.perf_counter() - began]), "max")
            self._interval_s = float(cost_s[0]) / COST_SHARE

    def freeze(self, iteration: int = NONE, state: Any = None) -> None:
        """Nothing more is kept, so that the manager may go. Not collective.

        Args:
            iteration: iterations that are done, with all that was due behind the last; NONE: something was left undone.
            state: as `keep` would be given it now.
        """
        manager, self._manager = self._manager, None
        if manager is None or self._live is None:
            return
        # With another mark this rank has updated since, and its buffers may be those of then.
        if iteration not in self._own and self._live.marks()[self._world.rank] == iteration:
            self._own[iteration] = state, manager.buffer_values(), manager.travelling_buffers
        self._live.freeze()

    def _arrange(self, scalars: Sequence[Mapping[str, Any]], iteration: int) -> None:
        """Have room for the vectors that there are. Collective."""
        world = self._world
        merged = merge_scalars(world.allgather_object(list(scalars)))
        states = sorted({key for entry in merged for key in entry.get("arrays", [])})
        keys = ["weights", *(f"state.{state}" for state in states)]
        if self._stores and self._stores[-1].keys == keys:
            return
        try:
            self._stores.append(Store(world, keys, self.runs, len(merged), self._files))
        except SharedMemoryError as error:
            if self._files is not None:
                self._files.keep_only([])
            if self._files is not None and self._survives:
                warn(f"nothing is kept for a restart, which will take the newest checkpoint: {error}")
                self._files = None
                self._arrange(scalars, iteration)  # it needs less room where a file is not needed
                return
            warn(f"no room to keep what a lost rank would take: {error}; then the newest checkpoint has to do")
            self._has_room, self.before = False, None
            self._stores.clear()
            return
        assert self._manager is not None, "frozen"
        if self._survives and self._manager.updates_in_place:
            with contextlib.suppress(SharedMemoryError):  # on every rank: the starts have to do
                self._live = Live(self._manager, world, states, len(merged), iteration)

    def _write(
        self, manager: ParameterManager, iteration: int, state: Any, scalars: Sequence[Mapping[str, Any]]
    ) -> None:
        store = self._stores[-1]
        self._own[iteration] = state, manager.buffer_values(), manager.travelling_buffers
        slot = store.slots[self._world.rank][self._num_kept % NUM_SLOTS]
        slot.open()
        for start, values in manager.shard_weight_pieces():
            self._compaction.copy(start, values, slot.vectors["weights"])
        for key, start, values in manager.shard_optimizer.state_pieces():
            if f"state.{key}" not in slot.vectors:
                return  # an optimizer that makes new state later: nothing is kept of it
            self._compaction.copy(start, values, slot.vectors[f"state.{key}"])
        slot.close(iteration, scalars)
        if self._files is not None:
            store_number = self._num_kept % NUM_SLOTS
            self._files.write_common(self._stores[-1].series, store_number, iteration, *self._own[iteration])
        for old in sorted(self._own)[:-3]:
            del self._own[old]

    def held(self) -> dict[int, list[int]]:
        """By rank, the iterations at whose starts this rank can read that one's image, and knows the rest."""
        found: dict[int, list[int]] = {}
        for rank, iteration in self._live.marks().items() if self._live is not None else ():
            found.setdefault(rank, []).extend({iteration} & self._own.keys())
        for store in self._stores:
            for rank, slots in store.slots.items():
                found.setdefault(rank, []).extend(slot.iteration for slot in slots if slot.iteration in self._own)
        return found

    def knows(self) -> list[int]:
        """The iterations of which this rank knows what is the same on all ranks."""
        return list(self._own)

    def image(self, rank: int, iteration: int) -> Slot | LiveImage | None:
        """A rank's image, where this one can read it."""
        if self._live is not None and self._live.marks().get(rank) == iteration:
            return self._live.image(rank)
        slots = [slot for store in self._stores for slot in store.slots.get(rank, [])]
        return next((slot for slot in slots if slot.iteration == iteration), None)

    def state(self, iteration: int) -> tuple[Any, dict[str, torch.Tensor], list[str] | None]:
        """What was the same on all ranks: `keep`'s state, buffers, and the names of those that travel."""
        return self._own[iteration]


def _unpadded(manager: ParameterManager, runs: Sequence[Piece]) -> list[Piece]:
    return merge_pieces(manager.layout.unpadded(run) for run in runs)


class Found:
    """A start of a group that all of which can be read.

    Args:
        memory: whose, or what is read from files.
        iteration: iterations that were done then.
        holders: by rank of then, the ranks of now that can read its image.
    """

    def __init__(self, memory: Memory | Images, iteration: int, holders: Mapping[int, Sequence[int]]) -> None:
        self.memory, self.iteration, self._holders = memory, iteration, holders

    @property
    def state(self) -> Any:
        """What `Memory.keep` was given."""
        return self.memory.state(self.iteration)[0]

    @property
    def before(self) -> Memory | None:
        """What the memory of the next course is to keep until it has its own."""
        return self.memory if isinstance(self.memory, Memory) else None

    def restore(self, manager: ParameterManager, world: World) -> None:
        """Give weights, buffers and optimizer their values of then. Collective."""
        _, buffers, travelling = self.memory.state(self.iteration)
        wanted, size = wanted_by(manager)
        vectors: dict[str, Float32Array] = {}
        scalars = []
        for rank in range(len(self.memory.runs)):
            found, own_scalars = self._image(rank, world)
            scalars.append(own_scalars)
            self._take(rank, found, wanted, size, vectors)
        manager.restore_buffers(buffers)
        install(manager, vectors, merge_scalars(scalars))
        if travelling is not None:
            manager.settle_buffers(travelling)

    def _image(self, rank: int, world: World) -> tuple[Mapping[str, Float32Array], list[dict[str, Any]]]:
        """A rank's vectors and scalars. Collective where not all can read them."""
        image, holders = self.memory.image(rank, self.iteration), self._holders[rank]
        if len(holders) == world.size:
            assert image is not None, "all said that they can read it"
            return image.vectors, image.scalars()
        told = None if image is None else (list(image.vectors), image.scalars())
        keys, scalars = world.broadcast_object(told, root=holders[0])
        length = sum(stop - start for start, stop in self.memory.runs[rank])
        vectors = {key: np.empty(length, np.float32) if image is None else image.vectors[key] for key in keys}
        for vector in vectors.values():
            world.broadcast(vector, root=holders[0])
        return vectors, scalars

    def _take(
        self,
        rank: int,
        found: Mapping[str, Float32Array],
        wanted: Sequence[Wanted],
        size: int,
        vectors: dict[str, Float32Array],
    ) -> None:
        """Copy what is wanted of a rank's vectors."""
        pieces = list(overlaps(self.memory.runs[rank], wanted))
        for key, vector in found.items():
            into = vectors.setdefault(key, np.zeros(size, np.float32))
            for place, target, number in pieces:
                into[target : target + number] = vector[place : place + number]


def find_in_files(files: LocalFiles, newer_than: int, fits: Callable[[dict[str, Any]], bool]) -> Found | str:
    """The newest start that the nodes have kept for a restart, or why there is none. Collective.

    Args:
        files: of the nodes.
        newer_than: iterations that it must have more than.
        fits: whether a state is one of this training.
    """
    found = files.find(newer_than, fits)
    if isinstance(found, str):
        return found
    choice, images = found
    return Found(images, choice.iteration, {rank: [holder] for rank, holder in enumerate(choice.holders)})


def find(memory: Memory | None, world: World) -> Found | None:
    """The newest start of a group that can be restored, the same on all ranks; None: there is none. Collective."""
    chain = []
    while memory is not None:
        chain.append(memory)
        memory = memory.before
    told: list[dict[int, tuple[dict[int, list[int]], list[int]]]] = world.allgather_object(
        {each.generation: (each.held(), each.knows()) for each in chain}
    )
    for each in chain:  # newest first
        if not all(each.generation in other for other in told):
            continue
        own = [other[each.generation] for other in told]
        known = set[int].intersection(*(set(knows) for _, knows in own))
        holders = _best([held for held, _ in own], len(each.runs), known)
        if holders is not None:
            return Found(each, *holders)
    return None


def _best(
    told: Sequence[Mapping[int, Sequence[int]]], num_ranks: int, known: set[int]
) -> tuple[int, dict[int, list[int]]] | None:
    """The newest iteration that somebody can read of every rank, and who can read what.

    Args:
        told: by rank of now, what it can read: by rank of then, iterations.
        num_ranks: ranks of then.
        known: iterations of which all know the rest.
    """
    common = known
    for rank in range(num_ranks):
        common = common & {iteration for each in told for iteration in each.get(rank, [])}
    if not common:
        return None
    newest = max(common)
    return newest, {
        rank: [now for now, each in enumerate(told) if newest in each.get(rank, [])] for rank in range(num_ranks)
    }
