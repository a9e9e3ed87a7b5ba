"""Checkpoints: each rank writes its own shard of weights and optimizer state; nothing is gathered on one rank.

A checkpoint is a directory `checkpoints/epoch-000003`, or `epoch-000003+000017` where 17 iterations more are done, of

- `shard-00000-of-00004.safetensors`, one per rank that holds elements: "weights" and one vector per kind of
  element-wise optimizer state, float32, in the model's order without alignment gaps, so any number of ranks can read
  the elements that it needs;
- `rest.safetensors`: what is not trained (buffers, frozen parameters), by its state-dict name;
- `manifest.json`: names and shapes, which elements are in which file with checksums, the optimizer's scalars and
  options, and the training's position. It is written last.

Phases of `save` (collective): 1. rank 0 makes a temporary directory; 2. every rank writes its file; 3. checksums and
scalars are gathered; 4. rank 0 writes the rest and the manifest and renames the directory. After each phase the ranks
agree; a rank that failed (a full disk) stops all with its message, the temporary directory is removed, and the previous
checkpoint is untouched. If a rank dies, the temporary directory stays behind and is removed by the next save.

Nothing is pickled: loading a stranger's checkpoint cannot run code.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from mpidl._version import __version__
from mpidl.checkpoint.files import (
    MANIFEST,
    contiguous_copy,
    digest,
    publish,
    read_manifest,
    remove,
    sync,
    usual_mode,
    write_json,
)
from mpidl.errors import CheckpointError
from mpidl.parameters import FlatLayout, ParameterManager
from mpidl.parameters.layout import Piece, merge_pieces
from mpidl.parameters.state import group_options, merge_scalars

Float32Array = NDArray[np.float32]
REST = "rest.safetensors"


def save(manager: ParameterManager, path: pathlib.Path, progress: Mapping[str, Any]) -> int:
    """Write a checkpoint. Collective.

    Args:
        manager: whose weights and optimizer state.
        path: the checkpoint's directory; its parent is made.
        progress: the training's position, as JSON values.

    Returns:
        Bytes of all files, on every rank.

    Raises:
        CheckpointError: on every rank: a file could not be written, or weights are not finite.
    """
    temporary = path.with_name(f".new-{path.name}")
    try:
        _save(manager, temporary, path, progress)
    except CheckpointError:  # on every rank
        if manager.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    sizes = [file.stat().st_size for file in path.iterdir()] if manager.world.rank == 0 else []
    return int(manager.world.for_purpose("checkpoint").broadcast_object(sum(sizes)))


def _save(manager: ParameterManager, temporary: pathlib.Path, path: pathlib.Path, progress: Mapping[str, Any]) -> None:
    world = manager.world.for_purpose("checkpoint")
    with world.agreed("preparing a checkpoint"):
        if world.rank == 0:
            _attempt(lambda: _make_empty(temporary), temporary)
    with world.agreed("writing a checkpoint"):
        entry = _attempt(lambda: _write_shard(manager, temporary), temporary)
    entries = world.allgather_object((entry, manager.shard_optimizer.scalars()))
    with world.agreed("finishing a checkpoint"):
        if world.rank == 0:
            files = [shard for shard, _ in entries if shard]
            scalars = merge_scalars([own for _, own in entries])
            _attempt(lambda: _finish(manager, temporary, path, files, scalars, progress), temporary)


def _attempt(action: Any, path: pathlib.Path) -> Any:
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; the previous one is kept") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; the previous one is kept") from None


def _make_empty(path: pathlib.Path) -> None:
    for left_over in path.parent.glob(".new-*"):
        remove(left_over)
    path.mkdir(parents=True)


def without_gaps(layout: FlatLayout, vector: Float32Array, piece: Piece) -> Float32Array:
    """The elements of `piece`, alignment gaps left out; `vector` begins at the piece's start."""
    parts = [vector[start - piece[0] : stop - piece[0]] for _, start, stop in layout.tensors_in(piece)]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _shard_without_gaps(layout: FlatLayout, vector: Float32Array, runs: list[Piece]) -> Float32Array:
    """A shard's vector, whose runs stand one behind the other, alignment gaps left out."""
    parts, offset = [np.empty(0, np.float32)], 0
    for start, stop in runs:
        parts.append(without_gaps(layout, vector[offset : offset + stop - start], (start, stop)))
        offset += stop - start
    return np.concatenate(parts)


def _write_shard(manager: ParameterManager, directory: pathlib.Path) -> dict[str, Any]:
    """Write this rank's file; an empty entry when it holds nothing."""
    layout, runs, rank = manager.layout, manager.shard_runs, manager.world.rank
    unpadded = [layout.unpadded(run) for run in runs]
    if all(start == stop for start, stop in unpadded) or (manager.is_replicated and rank > 0):
        return {}
    weights = _shard_without_gaps(layout, manager.shard_weights(), runs)
    if not np.isfinite(weights).all():
        raise CheckpointError("the weights are not finite any more; the previous checkpoint is kept")
    arrays = {"weights": weights}
    for key, vector in manager.shard_optimizer.arrays().items():
        arrays[f"state.{key}"] = _shard_without_gaps(layout, vector, runs)
    path = directory / f"shard-{rank:05d}-of-{manager.world.size:05d}.safetensors"
    save_arrays(arrays, path)
    usual_mode(path)
    sync(path)  # by the host that wrote it: on network file systems nobody else can
    return {"file": path.name, "runs": merge_pieces(unpadded), "sha256": digest(path)}


def _finish(
    manager: ParameterManager,
    temporary: pathlib.Path,
    path: pathlib.Path,
    files: list[dict[str, Any]],
    scalars: list[dict[str, Any]],
    progress: Mapping[str, Any],
) -> None:
    rest, aliases = _rest_of(manager)
    save_tensors({name: contiguous_copy(tensor) for name, tensor in rest.items()}, temporary / REST)
    usual_mode(temporary / REST)
    write_json(
        temporary / MANIFEST,
        {
            "format": 3,
            "mpidl": __version__,
            "torch": torch.__version__,
            "layout": manager.layout.digest(),
            "tensors": [[slot.name, list(slot.shape)] for slot in manager.layout.slots],
            "aliases": aliases,
            "shards": files,
            "rest": {"file": REST, "sha256": digest(temporary / REST)},
            "optimizer": {
                "class": type(manager.optimizer).__name__,
                "state": scalars,
                "options": [_plain(options) for options in group_options(manager.optimizer)],
            },
            "buffers": manager.travelling_buffers,
            "progress": dict(progress),
        },
    )
    publish(temporary, path)


def _rest_of(manager: ParameterManager) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is in the state dict and not trained, by name; and the second names of tied parameters."""
    trained = {slot.name for slot in manager.layout.slots}
    state = manager.model.state_dict(keep_vars=True)
    owner = {id(parameter): name for name, parameter in manager.model.named_parameters()}
    aliases = {name: owner[id(t)] for name, t in state.items() if owner.get(id(t), name) != name}
    return {name: t for name, t in state.items() if name not in trained and name not in aliases}, aliases


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that JSON can hold: what the optimizer is built with again decides the others."""
    return {k: v for k, v in options.items() if v is None or isinstance(v, bool | int | float | str | tuple | list)}


def load(manager: ParameterManager, path: pathlib.Path) -> dict[str, Any]:
    """Take weights, buffers and optimizer state from a checkpoint, written on any number of ranks. Collective.

    Returns:
        The training's position, as it was given to `save`.

    Raises:
        CheckpointError: on every rank: damaged, or of another model or optimizer.
    """
    world = manager.world.for_purpose("checkpoint")
    with world.agreed(f"loading {path}"):
        manifest = read_manifest(path)
        _check_fits(manager, path, manifest)
        _check_options(manager, path, manifest)
        if world.rank == 0:
            for entry in [*manifest["shards"], manifest["rest"]]:
                _check_digest(path, entry)
    with world.agreed(f"loading {path}"):
        vectors = _read_shard(manager, path, manifest)
        rest = _read_rest(manager, path / REST)
    for tensor, value in rest:
        tensor.copy_(value)
    manager.set_shard_weights(vectors.pop("weights"))
    manager.shard_optimizer.load(vectors, manifest["optimizer"]["state"])
    for group, options in zip(manager.param_groups, manifest["optimizer"]["options"], strict=True):
        group["lr"] = options.get("lr", group["lr"])  # the other options are the same
    if manifest["buffers"] is not None:
        manager.settle_buffers(manifest["buffers"])
    progress: dict[str, Any] = manifest["progress"]
    return progress


def _check_fits(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    if manifest["layout"] != manager.layout.digest():
        given = [(name, tuple(shape)) for name, shape in manifest["tensors"]]
        own = [(slot.name, slot.shape) for slot in manager.layout.slots]
        raise CheckpointError(f"{path} is of another model: {_first_difference(given, own)}")
    kind = type(manager.optimizer).__name__
    if manifest["optimizer"]["class"] != kind or len(manifest["optimizer"]["options"]) != len(manager.param_groups):
        raise CheckpointError(
            f"{path} is of {manifest['optimizer']['class']} with {len(manifest['optimizer']['options'])} param "
            f"groups, this run has {kind} with {len(manager.param_groups)}"
        )


def _check_options(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """The optimizer's options must be those of the checkpoint; learning rates come with each plan."""
    for index, options in enumerate(group_options(manager.optimizer)):
        own = json.loads(json.dumps(_plain(options)))
        for key, value in manifest["optimizer"]["options"][index].items():
            if key in own and own[key] != value and key not in ("lr", "initial_lr"):
                raise CheckpointError(
                    f"{path} was written with {key} {value} in param group {index}, this run has {own[key]}; resume "
                    "with the same"
                )


def _first_difference(given: list[Any], own: list[Any]) -> str:
    for a, b in zip(given, own, strict=False):
        if a != b:
            return f"it has {a[0]} {a[1]} where this model has {b[0]} {b[1]}"
    return f"it has {len(given)} trained tensors, this model {len(own)}"


def _check_digest(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
    file = path / pathlib.PurePath(entry["file"]).name
    try:
        found = digest(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if found != entry["sha256"]:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's")


def _read_shard(manager: ParameterManager, path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Float32Array]:
    """This rank's part of every vector, float32, (shard size,), alignment gaps filled with zeros."""
    layout, runs = manager.layout, manager.shard_runs
    keys = {"weights", *(f"state.{k}" for entry in manifest["optimizer"]["state"] for k in entry.get("arrays", []))}
    vectors: dict[str, list[Float32Array]] = {key.removeprefix("state."): [np.empty(0, np.float32)] for key in keys}
    for run in runs:
        wanted = layout.unpadded(run)
        compact = {key: np.zeros(wanted[1] - wanted[0], np.float32) for key in keys}
        for key, start, values in _overlaps(path, manifest, wanted):
            compact[key][start - wanted[0] : start - wanted[0] + values.size] = values
        for key, values in compact.items():
            vectors[key.removeprefix("state.")].append(_with_gaps(layout, values, run))
    return {key: np.concatenate(parts) for key, parts in vectors.items()}


def _with_gaps(layout: FlatLayout, compact: Float32Array, run: Piece) -> Float32Array:
    vector, offset = np.zeros(run[1] - run[0], np.float32), 0
    for _, start, stop in layout.tensors_in(run):
        vector[start - run[0] : stop - run[0]] = compact[offset : offset + stop - start]
        offset += stop - start
    return vector


def _overlaps(
    path: pathlib.Path, manifest: Mapping[str, Any], wanted: Piece
) -> Iterator[tuple[str, int, Float32Array]]:
    """(vector, first element, values) of every run of wanted elements, file by file."""
    for entry in manifest["shards"]:
        found, offset = [], 0
        for first, last in entry["runs"]:
            start, stop = max(first, wanted[0]), min(last, wanted[1])
            if start < stop:
                found.append((start, offset + start - first, stop - start))
            offset += last - first
        if not found:
            continue
        file = path / pathlib.PurePath(entry["file"]).name
        try:
            with safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    for start, place, size in found:
                        values = opened.get_slice(key)[place : place + size]
                        if values.shape != (size,):
                            raise CheckpointError(f"{file} holds {values.shape} elements of {key} from {start}")
                        yield key, start, values
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None


def _read_rest(manager: ParameterManager, path: pathlib.Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor of the model, its value) of every buffer and frozen parameter."""
    own, found = _rest_of(manager)[0], _load_tensors(path)
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise CheckpointError(
                f"{path} holds {name} {tuple(value.shape)} {value.dtype}, which this model does not have"
            )
    missing = sorted(own.keys() - found.keys())
    if missing:
        raise CheckpointError(f"{path} does not hold {missing[0]}, which this model has; it is of another model")
    return [(own[name].detach(), value) for name, value in found.items()]


def _load_tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_tensors(path))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_weights(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint directory, without a model; no MPI."""
    manifest = read_manifest(path)
    total = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in manifest["tensors"])
    weights = np.zeros(total, np.float32)
    for entry in [*manifest["shards"], manifest["rest"]]:
        _check_digest(path, entry)
    for key, start, values in _overlaps(path, manifest, (0, total)):
        if key == "weights":
            weights[start : start + values.size] = values
    state, offset = {}, 0
    for name, shape in manifest["tensors"]:
        size = int(np.prod(shape, dtype=np.int64))
        state[name] = torch.from_numpy(weights[offset : offset + size].copy()).view(shape)
        offset += size
    state.update(_load_tensors(path / REST))
    state.update({alias: state[name] for alias, name in manifest["aliases"].items()})
    return state
