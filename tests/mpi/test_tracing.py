"""A trace has what all ranks did in the iterations asked for, on one clock, and changes no number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl.runtime import World, clocks
from mpidl.telemetry import Telemetry
from tests.mpi.cases import classes, dense, job_of, made, trainer_of
from tests.mpi.reference import differing
from tests.mpi.worlds import as_the_world, node_layouts, with_nodes

DATA = classes(64)
PER_EPOCH = 2


def train(world: World, run_dir: Path, epochs: int, trace: int) -> tuple[Any, list[dict[str, Any]]]:
    """The weights, and on rank 0 the events."""
    model = made(dense)
    telemetry = Telemetry(run_dir, quiet=True) if world.rank == 0 else None
    options = {"run_dir": run_dir, "telemetry": telemetry, "trace": trace, "bucket_mb": 0.01, "group_size": 3}
    trainer = trainer_of(model, job_of(*DATA), **options)
    trainer.fit(DATA, DATA, epochs=epochs)
    trainer.close()
    world.barrier()
    return model.state_dict(), [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def spans_of(run_dir: Path) -> list[dict[str, Any]]:
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [{**event, "track": tracks[event["pid"], event["tid"]]} for event in events if event["ph"] == "X"]


def of_track(spans: list[dict[str, Any]], rank: int, track: str) -> Iterator[tuple[float, float]]:
    for each in spans:
        if (each["pid"], each["track"]) == (rank, track):
            yield each["ts"], each["ts"] + each["dur"]


def check_nested(spans: list[dict[str, Any]], rank: int, track: str) -> None:
    """No two spans of a track overlap but where one is inside the other."""
    ends: list[float] = []
    for began, ended in of_track(spans, rank, track):
        while ends and ends[-1] <= began:
            ends.pop()
        assert not ends or ended <= ends[-1], f"rank {rank}, {track}"
        ends.append(ended)


def test_all_ranks_iterations_are_in_one_file_on_every_layout(world: World, shared_tmp_path: Path) -> None:
    for sizes in node_layouts(world):
        run_dir = shared_tmp_path / "-".join(map(str, sizes))
        with as_the_world(world, sizes):
            _, events = train(world, run_dir, epochs=6, trace=4)
        assert [event["iteration"] for event in events if event["event"] == "trace"] == [9]
        spans = spans_of(run_dir)
        for rank in range(world.size):
            names = [each["name"] for each in spans if (each["pid"], each["track"]) == (rank, "main thread")]
            assert [name for name in names if name.startswith("iteration")] == [f"iteration {i}" for i in (6, 7, 8, 9)]
            assert {"data", "forward", "backward", "update", "report", "planning", "validation"} <= set(names)
            for track in {each["track"] for each in spans if each["pid"] == rank}:
                check_nested(spans, rank, track)
        assert sum(each["name"] == "backward" for each in spans) == 4 * 8
        stages = {each["name"] for each in spans if each["track"].startswith("buckets")}
        expected = {"bucket 0 local sum", "bucket 0 reduce-scatter", "bucket 0 allgather", "squares allgather"}
        assert expected <= stages if len(sizes) > 1 else not stages


def test_a_short_training_is_recorded_from_its_beginning_and_a_trace_changes_no_bit(
    world: World, shared_tmp_path: Path
) -> None:
    plain, events = train(world, shared_tmp_path / "plain", epochs=2, trace=0)
    assert not (shared_tmp_path / "plain" / "trace.json").exists()
    traced, events = train(world, shared_tmp_path / "traced", epochs=2, trace=100)
    assert differing(plain, traced) == []
    spans = spans_of(shared_tmp_path / "traced")
    assert sum(each["name"].startswith("iteration") for each in spans) == 2 * PER_EPOCH * world.size
    assert any(each["track"] == "checkpoint thread" for each in spans)
    assert events[-1]["event"] == "end"


def test_a_trace_that_cannot_be_written_is_a_warning(world: World, shared_tmp_path: Path) -> None:
    if world.rank == 0:
        (shared_tmp_path / "trace.json").mkdir()
    world.barrier()
    _, events = train(world, shared_tmp_path, epochs=2, trace=2)
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "trace.json cannot be written (Is a directory)" in warning
    assert events[-1]["status"] == "finished"


def test_clocks_of_one_machine_agree_within_the_error_that_is_told(world: World) -> None:
    if len(set(world.hostnames)) > 1:
        pytest.skip("several hosts")
    for sizes in node_layouts(world):
        with with_nodes(world, sizes) as layout:
            found = clocks.offsets(layout)
            assert np.all(np.abs(found[:, 0]) <= found[:, 1])
            elsewhere = np.array(layout.node_of) > 0
            assert np.all(found[elsewhere, 1] > 0) or world.rank > 0
            assert not found[~elsewhere].any()


def test_metrics_have_each_rank_s_phases_cores_and_histograms(world: World, shared_tmp_path: Path) -> None:
    telemetry = Telemetry(shared_tmp_path, quiet=True) if world.rank == 0 else None
    model = made(dense)
    trainer = trainer_of(model, job_of(*DATA), run_dir=shared_tmp_path, telemetry=telemetry, histograms=True)
    trainer.fit(DATA, epochs=2)
    trainer.close()
    world.barrier()
    events = [json.loads(line) for line in (shared_tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [place["host"] for place in events[0]["places"]] == list(world.hostnames)
    assert all(place["cores"] for place in events[0]["places"])
    for group in (event for event in events if event["event"] == "group"):
        assert group["rank_phases"]["ranks"] == list(range(world.size))
        for name, mean in group["phases"].items():
            assert np.mean(group["rank_phases"][name]) == pytest.approx(mean, abs=2e-6)
    told = [event["parameters"] for event in events if event["event"] == "histograms"]
    assert len(told) == 2
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        seen = values[:: -(-len(values) // 2**14)]  # of large ones every n-th
        assert told[-1][name]["min"] == pytest.approx(seen.min().item())
        assert sum(told[-1][name]["counts"]) == len(seen)
