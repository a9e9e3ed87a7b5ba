"""What a run derived from its settings and its machine, and what it came to: the first and last line of the metrics."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpidl._version import __version__
from mpidl.parameters import ParameterManager
from mpidl.scheduling import Move, Triggers

_RANKS_TOLD = 16
"""All ranks' partitions are told for so many."""


def describe_start(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of the "start" event.

    Args:
        facts: the manager, the triggers and the settings of the run; see `Trainer`.
    """
    manager: ParameterManager = facts["manager"]
    triggers: Triggers = facts["triggers"]
    world, assignment = manager.world, manager.assignment
    return {
        "ranks": world.size,
        "nodes": world.num_nodes,
        "hosts": list(dict.fromkeys(world.hostnames)),
        "threads_per_rank": world.threads_per_rank,
        "partitions": assignment.num_partitions,
        "partition_ranges": [list(assignment.range_of(rank)) for rank in range(world.size)],
        "batch_size": facts["batch_size"],
        "group_size": facts["group_size"],
        "parameters": manager.layout.num_elements,
        "shard_size": sum(stop - start for start, stop in manager.shard_runs),
        "memory_per_rank_bytes": manager.memory_bytes(),
        "train_samples": facts["train_samples"],
        "validation_samples": facts["validation_samples"],
        "epochs": triggers.epochs,
        "iterations_per_epoch": triggers.iterations_per_epoch,
        "total_iterations": triggers.total_iterations,
        "first_iteration": facts["first_iteration"],
        "bits": "none" if facts["drop_share"] else _class_of_bits(facts["reduction"], facts["wire"]),
        "reduction": facts["reduction"],
        "wire": facts["wire"],
        "balance": facts["balance"],
        "drop_share": facts["drop_share"],
        "seed": facts["seed"],
        "library": world.library,
        "run_dir": facts["run_dir"],
        "versions": {
            "mpidl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def describe_move(move: Move, hostnames: Sequence[str]) -> dict[str, Any]:
    """The fields of a "balance" event, which follows the "group" event whose report it is drawn from.

    Args:
        move: the decision.
        hostnames: of each rank.
    """
    before, after = np.diff(move.before.starts).tolist(), np.diff(move.after.starts).tolist()
    if len(after) > _RANKS_TOLD:
        changed = sum(x != y for x, y in zip(before, after, strict=True))
        told = f"its partitions {before[move.rank]} -> {after[move.rank]}, those of {changed} ranks change"
    else:
        told = f"partitions {' '.join(map(str, before))} -> {' '.join(map(str, after))}"
    name = f"rank {move.rank} ({hostnames[move.rank]})"
    return {
        "rank": move.rank,
        "speed": move.speed,
        "gain": move.gain,
        "partition_starts": move.after.starts,
        "message": f"{name} computes at {move.speed:.2f} of the others' speed: {told}",
    }


def _class_of_bits(reduction: str, wire: str) -> str:
    """What the result depends on: the partitions; the layout of nodes as well; or more than that, "none"."""
    if reduction != "ordered":
        return "none"
    return "partitions" if wire == "float32" else "layout"


def describe_end(history: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a training came to, for its "end" event.

    Args:
        history: the events of epochs and validations of this run.
        seconds: of this run.
    """
    ended = [event for event in history if event["event"] == "epoch"]
    validations = [event for event in history if event["event"] == "validation"]
    return {
        "seconds": seconds,
        "samples_per_s": sum(event["samples"] for event in ended) / seconds,
        "loss": ended[-1]["loss"] if ended else None,
        "validation": {k: v for k, v in validations[-1].items() if k != "event"} if validations else {},
    }
