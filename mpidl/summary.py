"""What a run derived from its settings and its machine, and what it came to: the first and last line of the metrics."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpidl._version import __version__
from mpidl.parameters import Assignment, ParameterManager
from mpidl.runtime import Slurm, World
from mpidl.runtime.threads import own_cores
from mpidl.scheduling import Move, Triggers
from mpidl.scheduling.stragglers import Change

_RANKS_TOLD = 16
"""All ranks' partitions are told for so many."""


def describe_start(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of the "start" event.

    Args:
        facts: the manager, the triggers and the settings of the run; see `Trainer`.
    """
    manager: ParameterManager = facts["manager"]
    triggers: Triggers = facts["triggers"]
    world, assignment, slurm = manager.world, manager.assignment, Slurm.from_environment()
    end_time: float | None = facts["end_time"]
    return {
        "ranks": world.size,
        "nodes": world.num_nodes,
        "hosts": list(dict.fromkeys(world.hostnames)),
        "places": facts["places"],
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
        "recovery": facts["recovery"],
        "goes_on": facts["goes_on"],
        "lost": facts["lost"],
        "elapsed_s": facts["elapsed_s"],
        "bits": "none" if facts["drop_share"] else _class_of_bits(facts["reduction"], facts["wire"]),
        "reduction": facts["reduction"],
        "wire": facts["wire"],
        "balance": facts["balance"],
        "drop_share": facts["drop_share"],
        "seed": facts["seed"],
        "library": world.library,
        "slurm": None if slurm is None else slurm.describe(),
        "seconds_left": None if end_time is None else end_time - time.time(),
        "run_dir": facts["run_dir"],
        "versions": {
            "mpidl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def describe_place(world: World) -> dict[str, Any]:
    """Where this rank runs: its node, its host, and the cores that it is bound to, such as "0-7,16"."""
    return {"node": world.node, "host": world.hostname, "cores": runs_of(own_cores())}


def runs_of(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-7,16"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def describe_lost(lost: Sequence[tuple[int, str]], iteration: int) -> list[dict[str, Any]]:
    """What "start" and "end" events tell of lost ranks: who, and the iterations done where the others go on."""
    return [{"rank": rank, "host": host, "iteration": iteration} for rank, host in lost]


def describe_recovery(
    lost: Sequence[tuple[int, str]], ranks: int, iteration: int, repeated: int, seconds: float, source: str
) -> dict[str, Any]:
    """The fields of a "recovery" event, behind which a "start" event follows.

    Args:
        lost: number, as it was, and host of each rank that was lost.
        ranks: that go on.
        iteration: iterations that are done where they go on.
        repeated: so many after these had been done before.
        seconds: from when the loss was noticed.
        source: what they go on from.
    """
    names = " and ".join(f"rank {rank} ({host})" for rank, host in lost)
    on = f"{ranks} rank{'s' * (ranks != 1)} go{'es' * (ranks == 1)} on"
    were = "was" if len(lost) == 1 else "were"
    message = f"{names} {were} lost; {on} from iteration {iteration + 1}, from {source}, {seconds:.2g} s later"
    return {
        "lost": describe_lost(lost, iteration),
        "ranks": ranks,
        "iteration": iteration,
        "repeated": repeated,
        "seconds": seconds,
        "source": source,
        "message": message,
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


def describe_straggler(
    change: Change, hostnames: Sequence[str], assignment: Assignment, *, balances: bool, drops: bool
) -> dict[str, Any]:
    """The fields of a "straggler" event: who is slow for good, or no longer, and what is done about it.

    Args:
        change: what has become known.
        hostnames: of each rank.
        assignment: of the group.
        balances: whether partitions may move.
        drops: whether late partitions may be dropped.
    """
    rank, ratio = change.rank, change.ratio
    name = f"rank {rank} ({hostnames[rank]})"
    fields = {"rank": rank, "is_slow": change.is_slow, "ratio": ratio}
    if not change.is_slow:
        return {**fields, "message": f"{name} is no longer slow: {ratio:.2f} times the others' time a sample"}
    start, stop = assignment.range_of(rank)
    held, total = stop - start, assignment.num_partitions
    even = total / len(hostnames)
    if not balances:
        done = "nothing is done about it, as balance is off here"
    elif held < even:
        done = f"balance has left it {held} of {total} partitions"
    elif held == 1:
        done = "its one partition cannot be taken from it; more and smaller ones could be"
    else:
        done = f"it keeps {held} of {total} partitions, as no move saves enough; more and smaller ones could"
    done += "; what is late may be dropped" if drops else ""
    return {**fields, "message": f"{name} is slow for good, {ratio:.2f} times the others' time a sample: {done}"}


_LARGEST_SAMPLE = 1 << 14
_NUM_BINS = 32


def describe_histograms(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Of each parameter its smallest and largest value, and how many lie in each of 32 equal parts between them.

    Of large ones every n-th element is looked at, so that it takes no time worth telling.
    """
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        values = values[:: -(-values.numel() // _LARGEST_SAMPLE) or 1].float()
        low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
        counts = torch.histc(values, _NUM_BINS, low, high) if low < high else torch.tensor([float(values.numel())])
        found[name] = {"min": low, "max": high, "counts": counts.int().tolist()}
    return found


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
