"""What rank 0's thread does when all shards are written: the rest, the manifest, the name; and old checkpoints."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialised

from mpidl._version import __version__
from mpidl.checkpoint.files import (
    Keep,
    Position,
    clear_left_overs,
    discard,
    list_in,
    position_of,
    publish,
    sync,
    write_json,
)
from mpidl.checkpoint.manifest import FORMAT, MANIFEST, read_manifest, sealed
from mpidl.checkpoint.transfer import checksum
from mpidl.errors import CheckpointError
from mpidl.parameters import ParameterManager
from mpidl.parameters.state import group_options

REST = "rest.safetensors"


def draft(
    manager: ParameterManager,
    aliases: Mapping[str, str],
    scalars: list[dict[str, Any]],
    progress: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest as far as it is known when the snapshot is taken: without files, sums and number."""
    return {
        "format": FORMAT,
        "mpidl": __version__,
        "torch": torch.__version__,
        "mpi": manager.world.library,
        "ranks": manager.world.size,
        "layout": manager.layout.digest(),
        "tensors": [[slot.name, list(slot.shape)] for slot in manager.layout.slots],
        "aliases": dict(aliases),
        "optimizer": {
            "class": type(manager.optimizer).__name__,
            "state": scalars,
            "options": [plain_options(options) for options in group_options(manager.optimizer)],
            "names": manager.group_names,
        },
        "buffers": manager.travelling_buffers,
        "progress": json.loads(json.dumps(progress)),  # training goes on with the lists it holds
    }


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that JSON can hold: what the optimizer is built with again decides the others."""
    return {k: v for k, v in options.items() if v is None or isinstance(v, bool | int | float | str | tuple | list)}


class Publisher:
    """Gives finished checkpoints of one directory their names, and removes old ones. For rank 0.

    Args:
        directory: that holds the checkpoints; need not be there yet.
        keep: which of them stay.
    """

    def __init__(self, directory: pathlib.Path, keep: Keep) -> None:
        self._directory = directory
        self._keep = keep
        self._numbers: dict[Position, int] = {}
        clear_left_overs(directory)
        for position, path in list_in(directory):
            try:
                self._numbers[position] = int(read_manifest(path)["number"])
            except CheckpointError:
                self._numbers[position] = 0

    def publish(
        self,
        temporary: pathlib.Path,
        path: pathlib.Path,
        manifest: Mapping[str, Any],
        rest: Mapping[str, torch.Tensor],
        shards: list[tuple[dict[str, Any], int]],
    ) -> int:
        """Complete the directory `temporary` and rename it to `path`.

        Args:
            temporary: holds all shards, on disk.
            path: the checkpoint.
            manifest: as `draft` gave it.
            rest: what is not trained.
            shards: the manifest's entry and the length of each file.

        Returns:
            Bytes of all files.

        Raises:
            OSError: something cannot be written, or a rank's file is not seen here.
        """
        for entry, num_bytes in shards:
            _check_is_seen(temporary / entry["file"], num_bytes)
        content = serialised(dict(rest))
        (temporary / REST).write_bytes(content)
        sync(temporary / REST)
        number = 1 + max(self._numbers.values(), default=0)
        files = {
            "shards": [entry for entry, _ in shards],
            "rest": {"file": REST, "checksum": checksum(np.frombuffer(content, np.uint8)).hex()},
        }
        write_json(temporary / MANIFEST, sealed({**manifest, **files, "number": number}))
        num_bytes = sum(file.stat().st_size for file in temporary.iterdir())
        publish(temporary, path)
        sync(path.parent.parent)  # the first one made the folder, too
        self._remove_old(path, number)
        return num_bytes

    def _remove_old(self, path: pathlib.Path, number: int) -> None:
        written = position_of(path)
        if written is None:
            return
        self._numbers[written] = number
        for position in self._keep.gone(self._numbers, written):
            old = next((each for at, each in list_in(self._directory) if at == position), None)
            with contextlib.suppress(OSError):  # what is left of it is cleared away by the next run
                if old is not None:
                    discard(old)
            del self._numbers[position]


def _check_is_seen(file: pathlib.Path, num_bytes: int) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise OSError(f"{file.name} was written and is not seen by rank 0; all nodes must share the folder") from None
    if found != num_bytes:
        raise OSError(f"{file.name} has {found} bytes, {num_bytes} were written")
