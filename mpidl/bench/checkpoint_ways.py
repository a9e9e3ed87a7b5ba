"""Ways to write and read a checkpoint of the same bytes: mpidl's, what the disk allows, and torch's."""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import nn

from mpidl.bench.cases import Optimizer, shapes_of_millions
from mpidl.checkpoint import Writer, load
from mpidl.checkpoint.transfer import PIECE_BYTES, pages
from mpidl.parameters import ParameterManager
from mpidl.runtime import World

BLOCK_BYTES = 4 << 20


class State:
    """What is to be kept: weights and moments after one iteration, sharded over the ranks, and a folder for it.

    Args:
        world: the ranks.
        folder: that all of them see; each way has a part of it.
        millions: parameters.
        optimizer: gives the moments.
    """

    def __init__(self, world: World, folder: pathlib.Path, millions: float, optimizer: Optimizer) -> None:
        self.world, self.folder = world, folder
        model = nn.ParameterList(torch.zeros(shape) for shape in shapes_of_millions(millions))
        self.manager = ParameterManager(model, optimizer.factory, world=world)
        sum(parameter.sum() for parameter in model).backward()
        self.manager.step()
        num_vectors = 1 + optimizer.num_states
        self.total_bytes = 4 * num_vectors * self.manager.layout.num_elements
        own_bytes = sum(4 * num_vectors * (stop - start) for start, stop in self.manager.shard_runs)
        # Numbers that no disk can compress, of as many bytes as this rank's shard has; and in the shard itself.
        chance = np.random.default_rng(world.rank)
        self.own = chance.integers(0, 256, own_bytes, np.uint8)
        moments = (values for _, _, values in self.manager.shard_optimizer.state_pieces())
        for values in (*moments, *(values for _, values in self.manager.shard_weight_pieces())):
            chance.random(out=values, dtype=np.float32)


class Way:
    """One way to write. `pauses` has, of each run, the seconds after which training could have gone on."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.pauses: list[float] = []
        self.path = state.folder / type(self).__name__.lower()

    def prepare(self) -> None:
        """Take away what the last run wrote."""
        if self.state.world.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()
        self.state.world.barrier()

    def run(self) -> None:
        """Write all, and have it on disk."""
        began = time.perf_counter()
        done = self.write()
        self.pauses.append(time.perf_counter() - began)
        if done is not None:
            done()

    def write(self) -> Callable[[], object] | None:
        """Begin; what is left to wait for, None where nothing is."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds. Collective."""


class Mpidl(Way):
    """A snapshot, written by threads."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._writer = Writer(state.manager, self.path)
        self._writer.prepare()

    def write(self) -> Callable[[], object]:
        """Write."""
        self._writer.begin(self.path / "one", {})
        return self._complete

    def _complete(self) -> None:
        outcome = self._writer.complete()
        if outcome is not None and outcome.error is not None:
            raise OSError(outcome.error)

    def close(self) -> None:
        """End the thread. Collective."""
        self._writer.close()


class Plain(Way):
    """Each rank writes as many bytes with plain calls, and has them on disk; nothing is checked or told."""

    def write(self) -> None:
        """Write."""
        with (self.path / str(self.state.world.rank)).open("wb", buffering=0) as file:
            left = self.state.own
            while left.size:
                left = left[os.write(file.fileno(), left[:PIECE_BYTES].data) :]
            os.fsync(file.fileno())


class Dd(Way):
    """`dd conv=fsync` of all bytes, by one process."""

    def write(self) -> None:
        """Write."""
        if self.state.world.rank == 0:
            count = f"count={self.state.total_bytes}"
            target = f"of={self.path / 'file'}"
            flags = ["bs=4M", count, "iflag=count_bytes,fullblock", "conv=fsync"]
            subprocess.run(["dd", "if=/dev/zero", target, *flags], check=True, stderr=subprocess.DEVNULL)
        self.state.world.barrier()


class TorchSave(Way):
    """`torch.save` of the whole state on rank 0, which has it all, and fsync; the others wait."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        size = state.total_bytes // 4 if state.world.rank == 0 else 0
        self._tensor = torch.rand(size)

    def write(self) -> None:
        """Write."""
        if self.state.world.rank == 0:
            with (self.path / "state.pt").open("wb") as file:
                torch.save({"state": self._tensor}, file)
                file.flush()
                os.fsync(file.fileno())
        self.state.world.barrier()


class Dcp(Way):
    """`torch.distributed.checkpoint`: each rank saves its own shard, over gloo."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        own = torch.from_numpy(state.own[: state.own.size // 4 * 4].view(np.float32))
        self.tensors = {f"rank {state.world.rank}": own}

    def write(self) -> Callable[[], object] | None:
        """Write."""
        checkpoint = importlib.import_module("torch.distributed.checkpoint")  # one second, and for those ways only
        checkpoint.save(self.tensors, checkpoint_id=self.path)
        return None


class DcpAsync(Dcp):
    """The same by `async_save`, which copies and writes in a thread."""

    def write(self) -> Callable[[], object]:
        """Write."""
        checkpoint = importlib.import_module("torch.distributed.checkpoint")
        future: Future[Any] = checkpoint.async_save(self.tensors, checkpoint_id=self.path)
        return future.result


WAYS: Mapping[str, type[Way]] = {
    "dd": Dd,
    "plain-writes": Plain,
    "mpidl": Mpidl,
    "torch.save": TorchSave,
    "torch-dcp": Dcp,
    "torch-dcp-async": DcpAsync,
}


class Copy:
    """A plain copy of as many bytes as this rank's shard has, in memory that was touched before."""

    def __init__(self, state: State) -> None:
        self._source = torch.from_numpy(state.own)
        self._target = torch.zeros_like(self._source)

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """Copy."""
        self._target.copy_(self._source)


class MpidlLoad:
    """Read, check and take everything, from the disk."""

    def __init__(self, state: State, path: pathlib.Path) -> None:
        self._state, self._path = state, path

    def prepare(self) -> None:
        """Let the system forget the files."""
        forget(self._state.world, self._path)

    def run(self) -> None:
        """Read."""
        load(self._state.manager, self._path)


class PlainReads:
    """Each rank reads the file of as many bytes that it wrote into memory that it gets for it, as who resumes does.

    Nothing is checked. Where the system has to get memory from elsewhere first (a virtual machine's host), that counts.
    """

    def __init__(self, state: State, path: pathlib.Path) -> None:
        self._state, self._path = state, path

    def prepare(self) -> None:
        """Let the system forget the files."""
        forget(self._state.world, self._path)

    def run(self) -> None:
        """Read."""
        left = pages(self._state.own.nbytes)
        with (self._path / str(self._state.world.rank)).open("rb", buffering=0) as file:
            while number := file.readinto(left[:BLOCK_BYTES].data):
                left = left[number:]


class DdRead(PlainReads):
    """`dd` of the files of a folder to nowhere, one after the other, by one process."""

    def run(self) -> None:
        """Read."""
        if self._state.world.rank == 0:
            for file in self._path.iterdir():
                command = ["dd", f"if={file}", "of=/dev/null", "bs=4M"]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        self._state.world.barrier()


def forget(world: World, path: pathlib.Path) -> None:
    """Drop the files of a folder, which are on disk, from the page cache of this machine. Collective."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    world.barrier()
