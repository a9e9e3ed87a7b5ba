"""The manifest of a checkpoint: what is in which file, with checksums, its own among them. It is written last.

A reader may be given anybody's: what it says of types, names and sizes is checked here before anything is done with it.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpidl.checkpoint.transfer import SUM_BYTES, checksum
from mpidl.errors import MALFORMED, CheckpointError, DamagedError

MANIFEST = "manifest.json"
FORMAT = 5
_KEYS = {"tensors", "layout", "aliases", "shards", "rest", "optimizer", "buffers", "number", "progress"}
_FILE = re.compile(r"(shard-\d{5,}-of-\d{5,}|rest)\.safetensors")
_SUM = re.compile(rf"[0-9a-f]{{{2 * SUM_BYTES}}}")


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its own checksum."""
    return {**manifest, "checksum": _sum_of(manifest)}


def _sum_of(manifest: Mapping[str, Any]) -> str:
    """Of what it says, whatever its spaces and lines: Python writes the JSON that it has read as it was."""
    return checksum(np.frombuffer(json.dumps(manifest).encode(), np.uint8)).hex()


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: there is none, or it is not what was written.
        CheckpointError: it is of a version that this one does not read.
    """
    file = path / MANIFEST
    try:
        if not file.is_file():
            raise DamagedError(f"{path} is not a whole checkpoint: it has no {MANIFEST}")
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} is not a whole checkpoint: {file} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise DamagedError(f"{file} is damaged: it holds no manifest")
    given = manifest.pop("checksum", None)
    if given is None and isinstance(manifest.get("format"), int) and manifest["format"] < FORMAT:
        raise CheckpointError(
            f"{path} is of format {manifest['format']}, this version reads {FORMAT}; go on with the version that wrote "
            "it, or take its weights with that one's mpidl export"
        )
    try:
        if given != _sum_of(manifest):
            raise DamagedError(f"{file} is damaged: its checksum is not that of what it says")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} is of format {manifest.get('format')}, this version reads {FORMAT}")
        _check_keys(manifest)
        _check_shards(manifest)
        _check_optimizer(manifest)
    except MALFORMED as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedError(f"{file} is damaged: {type(error).__name__} {error}") from None
    return manifest


def _check_keys(manifest: dict[str, Any]) -> None:
    missing = sorted(_KEYS - manifest.keys())
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    names = [_text(name) for name, _ in manifest["tensors"]]
    if len({*names}) != len(names):
        raise ValueError("a tensor is there twice")
    buffers = [] if manifest["buffers"] is None else _list(manifest["buffers"])
    for name in [*_object(manifest["aliases"]).values(), *buffers]:
        _text(name)
    _object(manifest["progress"]), _count(manifest["number"])


def _check_shards(manifest: dict[str, Any]) -> None:
    """Raise unless the shards cover all elements, and all entries are of the types that readers expect."""
    runs = []
    for entry in [*manifest["shards"], manifest["rest"]]:
        if not _FILE.fullmatch(entry["file"]) or not _SUM.fullmatch(entry["checksum"]):
            raise ValueError(f"the name or checksum of {entry['file']}")
    for entry in manifest["shards"]:
        vectors = [_text(key) for key in entry["vectors"]]
        if _count(entry["data_start"]) < 8 or "weights" not in vectors or len({*vectors}) != len(vectors):
            raise ValueError(f"what shard {entry['file']} holds")
        if sorted(entry["runs"]) != entry["runs"]:
            raise ValueError(f"the order of the runs of {entry['file']}")
        runs += [(_count(start), _count(stop), entry["file"]) for start, stop in entry["runs"]]
    position = 0
    for start, stop, file in sorted(runs):
        if start != position or stop <= start:
            raise ValueError(f"shard {file} does not go on at element {position}")
        position = stop
    total = sum(math.prod(_count(length) for length in shape) for _, shape in manifest["tensors"])
    if position != total:
        raise ValueError(f"the shards end at element {position} of {total}")


def _check_optimizer(manifest: dict[str, Any]) -> None:
    optimizer = manifest["optimizer"]
    names = {name for name, _ in manifest["tensors"]}
    for state, options, group in zip(optimizer["state"], optimizer["options"], optimizer["names"], strict=True):
        if state:
            list(map(_text, _list(state["arrays"]))), list(map(_text, _list(state["tensor_scalars"])))
            for key, value in _object(state["scalars"]).items():
                if not isinstance(value, int | float):
                    raise TypeError(f"{key} of the optimizer's state is no number")
                if abs(value) >= 2**63 and key in state["tensor_scalars"]:
                    raise ValueError(f"{key} of the optimizer's state is too large")
        _object(options)
        if not names.issuperset(group):
            raise ValueError("the names of a param group")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no name")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):  # an empty text or list would do as one elsewhere
        raise TypeError(f"{value!r:.40} is no object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r:.40} is no count")
    return value
