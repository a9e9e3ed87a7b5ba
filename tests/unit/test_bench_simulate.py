"""What `mpidl bench simulate` makes of models and figures, and what it refuses; no MPI, no SimGrid."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from mpidl import cli, simulation
from mpidl.bench import simulate
from mpidl.bench.report import Report, write_json
from mpidl.bench.simulate_points import meta_model
from mpidl.bench.simulate_tables import best_rows
from mpidl.bench.workload import Machine, Workload
from mpidl.errors import ConfigError
from mpidl.report_page.benches import read_bench
from mpidl.report_page.scaling import scalings
from mpidl.runtime import World
from mpidl.simulation import Collective, FluidWire, Iteration, Phases

FEW = ["--method", "aggregated", "--models", "lenet5", "--nodes", "2,8", "--gbits", "1", "--networks", "fat_tree"]


class OneRank:
    """As much of a world as a simulation needs."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    @contextlib.contextmanager
    def agreed(self, _: str) -> Iterator[None]:
        yield


def report(*flags: str, size: int = 1) -> Report:
    return simulate.measure(cast(World, OneRank(size)), cli.parse(["bench", "simulate", *flags]))


@pytest.fixture(scope="module")
def vgg16() -> Workload:
    return Workload.of(meta_model("vgg16"), 1.0, 2.0)


def test_operations_are_those_of_the_papers(vgg16: Workload) -> None:
    assert vgg16.layout.num_elements == 138_357_544
    assert vgg16.operations == pytest.approx(15.47e9, rel=1e-3)
    assert Workload.of(meta_model("resnet50"), 1.0, 2.0).operations == pytest.approx(4.1e9, rel=0.02)


def test_gradients_are_ready_in_the_reverse_of_the_order_in_which_weights_are_needed(vgg16: Workload) -> None:
    parts = vgg16.iteration(16, Machine()).parts
    assert [part.needed_s for part in parts] == sorted(part.needed_s for part in parts)
    assert [part.ready_s for part in parts] == sorted((part.ready_s for part in parts), reverse=True)
    assert parts[0].needed_s == 0
    assert parts[0].ready_s == pytest.approx(2.0)
    assert parts[-1].ready_s < 0.02  # VGG's last layers are most of its weights and hardly any of its work


@pytest.mark.parametrize(("wire", "word"), [("float32", 4), ("bfloat16", 2)])
def test_every_node_sends_each_element_of_others_once_each_way(vgg16: Workload, wire: str, word: int) -> None:
    nodes = 16
    parts = vgg16.iteration(nodes, Machine(), wire=wire).parts
    for exchanges in ([[part.reduce] for part in parts], [part.publish for part in parts]):
        sent = sum((nodes - 1) * each.num_bytes for some in exchanges for each in some)
        assert sent == pytest.approx(word * vgg16.layout.size * (nodes - 1) / nodes, rel=0.02)


def test_ranks_of_a_node_add_up_before_they_send_as_far_as_the_tree_allows(vgg16: Workload) -> None:
    def reductions(ranks: int, reduction: str) -> list[Collective]:
        machine = Machine(ranks_per_node=ranks)
        return [part.reduce for part in vgg16.iteration(8, machine, reduction=reduction).parts]

    of_one, of_four, of_three = (sum(each.num_bytes for each in reductions(ranks, "ordered")) for ranks in (1, 4, 3))
    assert of_four == pytest.approx(of_one, rel=0.05)
    assert of_three == pytest.approx(2 * of_one, rel=0.05)  # three partitions are two nodes of the tree
    assert sum(each.num_bytes for each in reductions(3, "mpi")) == pytest.approx(of_one, rel=0.05)


def test_buffers_are_one_bucket_more_whose_few_owners_get_blocks_from_all() -> None:
    """16 nodes share 13 blocks of ResNet-50's 53,120 running means and variances: some have one, some none."""
    resnet = Workload.of(meta_model("resnet50"), 1.0, 2.0)
    assert resnet.changes_size == 53_120
    for reduction in ("ordered", "mpi"):
        for wire in ("float32", "bfloat16"):  # changes are not rounded
            changes = resnet.iteration(16, Machine(), reduction=reduction, wire=wire).changes
            assert changes is not None
            for each in (changes.reduce, *changes.publish):
                assert each.whole_bytes == pytest.approx(4 * 53_120)
                assert each.busiest_bytes == 4 * 4096


def test_mpi_copies_what_the_library_has_added_and_gathers_counters(vgg16: Workload) -> None:
    ordered, mpi = (vgg16.iteration(16, Machine(memory_bytes_s=1e9), reduction=each) for each in ("ordered", "mpi"))
    assert ordered.counters is None
    assert mpi.counters is not None
    assert mpi.counters.num_bytes == 6 * 8
    owned = vgg16.layout.size / 16
    assert sum(part.add_s for part in mpi.parts) == pytest.approx(8 * owned / 1e9, rel=0.02)
    assert sum(part.add_s for part in ordered.parts) == pytest.approx(4 * (2 + 15) * owned / 1e9, rel=0.02)


def test_points_are_told_with_the_best_bucket_and_a_slow_node() -> None:
    found = report(*FEW, "--slow-factor", "2", "--partitions-per-rank", "4")
    assert [table.title.split(":")[0] for table in found.tables] == [
        "efficiency of ordered, %", "best bucket of ordered, MiB", "time of mpi to ordered",
        "one node 2 times as slow",
    ]  # fmt: skip
    assert {(row["nodes"], row["way"]) for row in found.rows} == {
        (n, way) for n in (2, 8) for way in ("ordered", "mpi")
    }
    for row in found.rows:
        assert 0 < row["efficiency"] < 1
        assert row["seconds"] > row["limit_seconds"]
        if "slow_seconds" in row:
            assert row["seconds"] < row["slow_seconds"]
    assert "fat_tree, 8 nodes: aggregated" in found.notes


def test_a_report_s_page_shows_how_a_simulation_scales(tmp_path: Path) -> None:
    path = tmp_path / "simulate.json"
    found = report(*FEW)
    write_json(path, "simulate", {}, "mpidl bench simulate", found.rows)
    (scaling,) = scalings(read_bench(path).rows)
    efficiencies = [size.efficiency for size in scaling.ways["ordered"]]
    best = best_rows(row for row in found.rows if row["way"] == "ordered")
    assert efficiencies == pytest.approx([row["efficiency"] for row in best])


def test_compute_times_come_from_bench_step_where_it_has_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "step.json", "step", STEP)
    found = report(*FEW, "--step", path)
    assert {each["limit_seconds"] for each in found.rows} == {4.0}
    assert any("compute of lenet5: 1,000 + 3,000 ms" in note and "step.json" in note for note in found.notes)


def test_sums_and_updates_are_as_fast_as_bench_step_has_them_unless_told_otherwise(tmp_path: Path) -> None:
    twice = SPEEDS | {"sum_bytes_per_s": 4e9, "update_bytes_per_s": 3e9}
    path = write(tmp_path / "step.json", "step", STEP, SPEEDS, twice)

    def notes(*flags: str) -> str:
        return "; ".join(report(*FEW, *flags).notes)

    assert "sums and updates 3 and 2 GB/s a rank" in notes("--step", path)
    assert "sums and updates 24 and 24 GB/s a rank" in notes("--step", path, "--memory-gbytes", "24")
    assert "sums and updates 10 and 10 GB/s a rank" in notes()
    slow, fast = (Machine(memory_bytes_s=1e9, update_bytes_s=each) for each in (1e9, 2e9))
    workload = Workload.of(meta_model("lenet5"), 1.0, 2.0)
    (of_slow, *_), (of_fast, *_) = (workload.iteration(2, machine).parts for machine in (slow, fast))
    owned = of_slow.reduce.num_bytes / 4
    assert of_slow.update_s == pytest.approx(28e-9 * owned)
    assert of_fast.update_s == pytest.approx(18e-9 * owned)


def test_figures_without_mpidl_on_one_node_do_not_tell_how_fast_sums_are(tmp_path: Path) -> None:
    found = report(*FEW, "--step", write(tmp_path / "step.json", "step", STEP))
    assert "sums and updates 10 and 10 GB/s a rank" in found.notes[0]
    assert any("assumed: how fast sums and updates are (no mpidl-ordered" in note for note in found.notes)


def write(path: Path, bench: str, *rows: Any) -> str:
    path.write_text(json.dumps({"bench": bench, "rows": rows}))
    return str(path)


STEP: dict[str, Any] = {
    "way": "compute alone", "case": "lenet5, batch 32 a rank, sgd", "phases": {"forward": 1.0, "backward": 3.0},
    "ranks": 2, "nodes": 1,
}  # fmt: skip
SPEEDS = STEP | {"way": "mpidl-ordered", "sum_bytes_per_s": 2e9, "update_bytes_per_s": 1e9}
MEASURED: dict[str, Any] = {
    "case": "lenet5", "way": "ordered", "wire": "float32", "ranks": 2, "nodes": 2, "seconds": 1.0,
    "forward_seconds": 0.1, "backward_seconds": 0.2, "compute_seconds": 0.3, "bucket_bytes": 1 << 20,
    "link_gbit": 0.001, "exchange_bytes_per_s": 1e5,
}  # fmt: skip


@pytest.mark.parametrize("flags", [["--models", "digits_cnn"], ["--batch", "64"]])
def test_a_model_or_batch_that_bench_step_has_not_measured_is_refused(tmp_path: Path, flags: list[str]) -> None:
    path = write(tmp_path / "step.json", "step", STEP)
    name, batch = ("digits_cnn", 32) if "digits_cnn" in flags else ("lenet5", 64)
    with pytest.raises(ConfigError, match=f"no figures of {name} with batch {batch} a rank, but of lenet5, batch 32"):
        report(*FEW, *flags, "--step", path)


@pytest.mark.parametrize("name", ["way", "case", "phases", "update_bytes_per_s"])
def test_a_damaged_row_of_bench_step_is_named(tmp_path: Path, name: str) -> None:
    rows = [{key: value for key, value in row.items() if key != name} for row in (STEP, SPEEDS)]
    path = write(tmp_path / "step.json", "step", *rows)
    with pytest.raises(ConfigError, match=rf"step\.json is damaged.*'{name}' of a row is None"):
        report(*FEW, "--step", path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("forward_seconds", None), ("nodes", 0), ("ranks", 1.5), ("way", "ring"), ("wire", "int8"), ("seconds", "1")],
)
def test_a_damaged_row_of_waits_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path / "waits.json", "waits", MEASURED | {name: value})
    with pytest.raises(ConfigError, match=rf"waits\.json is damaged.*'{name}' of a row is {value!r}, not "):
        report("--method", "aggregated", "--measured", path)


def test_sleeps_that_the_measured_rate_has_in_it_and_buffers_are_not_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: list[Iteration] = []

    def simulate_it(iteration: Iteration, wire: FluidWire) -> Phases:
        simulated.append(iteration)
        return simulation.simulate(iteration, wire)

    monkeypatch.setattr("mpidl.bench.simulated.simulate", simulate_it)
    path = write(tmp_path / "waits.json", "waits", MEASURED | {"case": "resnet50", "exchange_bytes_per_s": 1e8})
    without, with_polls = (
        report("--method", "aggregated", "--measured", path, "--poll-us", poll).rows[0]["simulated_seconds"]
        for poll in ("0.001", "1000")
    )
    assert without == with_polls
    assert [(each.changes, each.poll_s) for each in simulated] == [(None, 0.0)] * 2


def test_measured_iterations_are_simulated_beside(tmp_path: Path) -> None:
    path = write(tmp_path / "waits.json", "waits", MEASURED)
    (row,) = report("--method", "aggregated", "--measured", path).rows
    wire_s = row["bytes"] / 1e5  # half of it each way, there and back
    assert wire_s < row["simulated_seconds"] < 1.1 * wire_s + 0.3
    assert row["error"] == pytest.approx(row["simulated_seconds"] - 1.0)


def test_measurements_with_either_wire_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "waits.json", "waits", MEASURED, MEASURED | {"wire": "bfloat16"})
    found = report("--method", "aggregated", "--measured", path)
    narrow, whole = found.rows
    assert narrow["simulated_seconds"] < 0.6 * whole["simulated_seconds"]
    assert [row[1:3] for row in found.tables[0].rows] == [("ordered", "bfloat16"), ("ordered", "float32")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "vgg"], "unknown model 'vgg'"),
        (["--models", "gpt"], "does not tell the shape of its images"),
        (["--networks", "torus"], "'torus' is unknown; allowed are fat_tree, dragonfly"),
        (["--nodes", "0"], "not a number above 0"),
        (["--throttle", "-1"], "not a number from 0"),
        (["--step", "no.json"], "no.json cannot be read"),
        (["--measured", "no.json"], "no.json cannot be read"),
        (["--taper", "3"], "--taper 3 does not divide"),
        (["--networks", "dragonfly,fat_tree", "--nodes", "2,4096", "--taper", "3"], "--taper 3 does not divide"),
        (["--slow-factor", "0.5"], "--slow-factor 0.5 is below 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_simulated(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "Simulator", None)
    with pytest.raises(ConfigError, match=message):
        report(*FEW, *flags)


def test_figures_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sync.json"
    path.write_text('{"bench": "sync", "rows": [{}]}')
    with pytest.raises(ConfigError, match="has no figures of waits"):
        report(*FEW, "--measured", str(path))


def test_more_ranks_than_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="runs on one rank, not on 2"):
        report(*FEW, size=2)


def test_as_many_rounds_are_simulated_flow_by_flow_as_are_not_too_many() -> None:
    assert simulate.first_rounds(Collective("alltoall", 256, 1.0), 10_000) == 1
    assert simulate.first_rounds(Collective("reduce_scatter", 64, 1e6), 640) == 10
