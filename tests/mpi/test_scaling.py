"""`mpidl bench scaling` at any world size, every rank a node of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpidl import cli
from mpidl.bench import scaling
from mpidl.bench.scaling_sizes import sizes_of
from mpidl.bench.step_ways import MPIDL
from mpidl.bench.waits import Layer, Waiting
from mpidl.errors import ConfigError
from mpidl.parameters import ParameterManager
from mpidl.runtime import World, faults
from tests.mpi.worlds import with_nodes

SMALL = ["bench", "scaling", "--model", "lenet5", "--batch", "2", "--repeats", "1", "--iterations", "1"]
FOUR = scaling.STRATEGIES.split(",")


@pytest.mark.parametrize(
    "flags", [["--bucket-mb", "1"], ["--compute-ms", "4", "--wire-gbit", "2"]], ids=["real", "waits"]
)
def test_every_strategy_has_a_row_for_every_size_and_mode_the_same_on_all_ranks(world: World, flags: list[str]) -> None:
    with with_nodes(world, (1,) * world.size) as nodes:
        found = scaling.measure(nodes, cli.parse([*SMALL, *flags]))
    assert len(set(world.allgather_object(repr(found.rows)))) == 1
    compute = {row["batch"]: row for row in found.rows if row["case"] == "compute"}
    rows = [row for row in found.rows if row["case"] != "compute"]
    sizes = sizes_of((1,) * world.size, ["weak", "strong"], 2, 2 * world.size)
    expected = [(mode, size.nodes, way) for size in sizes for mode in ("weak", "strong") for way in FOUR]
    assert [(row["case"], row["nodes"], row["way"]) for row in rows] == expected
    waits = "--compute-ms" in flags
    for row in rows:
        assert row["ranks"] == row["nodes"]
        samples = 2 * row["ranks"] if row["case"] == "weak" else 2 * world.size
        assert (row["global_batch"], row["batch"]) == (samples, -(-samples // row["ranks"]))
        assert row["samples_per_s"] == pytest.approx(samples / row["seconds"])
        assert row["compute_seconds"] == compute[row["batch"]]["seconds"]
        assert row["is_waited"] == waits
        assert 0 < row["bucket_bytes"] <= row["bytes"]
        if waits and row["nodes"] > 1:
            assert row["wire_gbit"] == 2
            expected_s = 2 * row["bytes"] * (row["nodes"] - 1) / row["nodes"] / 2.5e8
            assert row["wire_limit_seconds"] == pytest.approx(expected_s)
        assert row["limit_seconds"] == max(row["compute_seconds"], row["wire_limit_seconds"] or 0)
    first = [row for row in rows if row["way"] == FOUR[0] and row["nodes"] == 1]
    assert [row["efficiency"] for row in first] == [1, 1]
    if waits:
        assert compute[2]["seconds"] == pytest.approx(0.004)
        assert compute[2 * world.size]["seconds"] == pytest.approx(0.004 * world.size)
    for row in compute.values():
        assert row["seconds"] == pytest.approx(row["forward_seconds"] + row["backward_seconds"])
        assert row["seconds"] == pytest.approx(sum(each["forward_s"] + each["backward_s"] for each in row["layers"]))


def test_a_chosen_number_of_nodes_is_measured_alone_with_the_samples_of_the_whole_run(world: World) -> None:
    flags = ["--nodes", "1", "--compute-ms", "4", "--ways", "mpidl-ordered"]
    with with_nodes(world, (1,) * world.size) as nodes:
        found = scaling.measure(nodes, cli.parse([*SMALL, *flags]))
    rows = [row for row in found.rows if row["case"] != "compute"]
    expected = [("weak", 1, 2, 1.0), ("strong", 1, 2 * world.size, 1.0)]
    assert [(row["case"], row["nodes"], row["global_batch"], row["efficiency"]) for row in rows] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "driver"], "unknown way 'driver'"),
        (["--model", "vgg"], "unknown model 'vgg'"),
        (["--nodes", "1,9"], r"--nodes 9 but this run has 1 node\(s\)"),
        (["--modes", "weak", "--global-batch", "64"], "--global-batch is for strong scaling"),
        (
            ["--model", "vgg13_32", "--batch", "1", "--modes", "weak"],
            r"vgg13_32 does not train on 1 sample\(s\) a rank",
        ),
    ],
)
def test_bad_input_is_an_error_of_all_ranks_before_anything_is_timed(
    world: World, flags: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        scaling.measure(world, cli.parse([*SMALL, *flags]))
    assert faults.is_on_all_ranks(caught.value)


@pytest.mark.parametrize("way", MPIDL)
def test_waits_leave_the_weights_what_they_are(world: World, way: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 300), nn.Linear(300, 4))
    course = (Layer("0", 1e-4, 1e-4), Layer("1", 1e-4, 1e-4))
    with with_nodes(world, (1,) * world.size) as nodes:
        waiting = Waiting(model, {2: course})
        manager = ParameterManager(waiting, lambda groups: torch.optim.SGD(groups, lr=0.1), world=nodes, **MPIDL[way])
        before = manager.weights.copy()
        for _ in range(3):
            waiting(torch.zeros(2, 1)).sum().backward()
            manager.step(wait=False)
        manager.wait()
        tolerance = 2**-8 if way == "mpidl-bfloat16" else 0.0
        np.testing.assert_allclose(manager.weights, before, rtol=tolerance)
        manager.close()
