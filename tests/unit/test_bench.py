"""What benchmarks are made of, without MPI: names, limits, figures, checks of kernels, pictures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpidl import cli
from mpidl.bench import cases, cost_model, curves, kernels, limits, picture, plan, plan_tables, report
from mpidl.bench.control import Groups
from mpidl.errors import ConfigError, DisagreementError
from mpidl.parameters import Team


def world_of(*node_sizes: int) -> Any:
    """The counts of a world, as its first rank sees them."""
    return SimpleNamespace(size=sum(node_sizes), num_nodes=len(node_sizes), local_size=node_sizes[0])


def row(way: str, seconds: float | None, case: str = "c") -> report.Row:
    spread = None if seconds is None else (seconds / 2, 2 * seconds)
    return report.row(world_of(2), case, way, seconds=seconds, spread=spread, limit_seconds=0.004)


# --- names ------------------------------------------------------------------------------------------------------------


def test_all_usable_ways_are_measured_unless_some_are_named() -> None:
    assert cases.chosen(None, ["a", "b"], {}) == ["a", "b"]
    assert cases.chosen(None, ["a", "b"], {"a": "it lacks c"}) == ["b"]
    assert cases.chosen("b,a,b", ["a", "b"], {}) == ["b", "a"]


def test_an_unknown_way_gets_near_names_and_all_names() -> None:
    with pytest.raises(ConfigError, match="unknown way 'dpp'; did you mean ddp.; allowed are mpidl, ddp"):
        cases.chosen("mpidl,dpp", ["mpidl", "ddp"], {})


def test_a_way_that_cannot_be_run_here_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="way other cannot be run here: pip install other"):
        cases.chosen("other", ["mpidl", "other"], {"other": "pip install other"})


def test_a_model_that_does_not_tell_what_it_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn:ReLU does not tell what it takes"):
        cases.build_model("torch.nn:ReLU")


@pytest.mark.parametrize(
    ("name", "input_shape", "target_shape"), [("lenet5", (3, 1, 28, 28), (3,)), ("gpt", (3, 128), (3, 128))]
)
def test_batches_fit_the_model_and_are_the_same_in_every_way(
    name: str, input_shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    model = cases.build_model(name)
    one, other = cases.Batches(model, 3, rank=1), cases.Batches(model, 3, rank=1)
    seen = []
    for _ in range(5):
        inputs, targets = one.next()
        again, _ = other.next()
        assert torch.equal(inputs, again)
        assert (inputs.shape, targets.shape) == (input_shape, target_shape)
        assert torch.isfinite(torch.nn.functional.cross_entropy(model(inputs), targets))
        seen.append(inputs)
    assert not torch.equal(seen[0], seen[1])
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sync", "--repeats", "0"], "argument --repeats: '0' is not a number above 0 without decimals"),
        (["sync", "--millions", "nan"], "argument --millions: 'nan' is not a number above 0"),
        (["step", "--batch", "1.5"], "argument --batch: '1.5'"),
        (["step", "--millions", "1"], "unknown argument --millions"),
        (["sync", "--milions", "1"], "unknown argument --milions; did you mean --millions"),
        (["sync", "--optimizer", "lars"], "--optimizer is 'lars', must be one of sgd, adam"),
        (["plan", "--group-sizes", "1,x"], "argument --group-sizes: 'x' is not a number above 0 without decimals"),
        (["plan", "--partitions", "8,0"], "argument --partitions: '0'"),
        (["plan", "--iteration-ms", "0"], "argument --iteration-ms: '0' is not a number above 0"),
        (["plan", "--millions", "1"], "unknown argument --millions"),
        (["speed"], "'speed'"),
        ([], "BENCH"),
    ],
)
def test_wrong_flags_are_told_in_words(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(["bench", *flags])
    assert message in str(caught.value)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("millions", "expected"), [(2.5, [1_000_000] * 2 + [500_000]), (1.0, [1_000_000]), (1e-9, [1])]
)
def test_millions_are_cut_into_tensors_of_a_million(millions: float, expected: list[int]) -> None:
    assert cases.shapes_of_millions(millions) == [(size,) for size in expected]


def test_a_model_s_shapes_are_those_of_its_parameters() -> None:
    assert sum(int(np.prod(shape)) for shape in cases.shapes_of_model("lenet5")) == 61_706


def test_ranks_share_the_weights_and_differ_in_the_gradients() -> None:
    first, second = (cases.Exchanged.of("x", [(7,), (2, 3)], cases.OPTIMIZERS["sgd"], rank) for rank in (0, 1))
    assert first.size == 13
    assert all(a.equal(b) for a, b in zip(first.weights, second.weights, strict=True))
    assert not any(a.equal(b) for a, b in zip(first.gradients, second.gradients, strict=True))
    assert all(gradient.min() >= 0.5 for gradient in first.gradients), "their sums stay away from zero"


def test_on_one_node_the_least_bytes_are_rows_and_state_and_weights_read_and_written() -> None:
    for ranks in (1, 2, 4):
        assert limits.memory_bytes(world_of(ranks), 100, 1) == 4 * 100 * (ranks + 2 + 2)
        assert limits.memory_bytes(world_of(ranks), 100, 2) == 4 * 100 * (ranks + 4 + 2)
        assert limits.wire_bytes(world_of(ranks), 100) == 0


def test_between_nodes_each_owns_its_part_of_the_state() -> None:
    # Two rows read; momentum read and written, weights read, of a half; all weights written.
    assert limits.memory_bytes(world_of(2, 2), 100, 1) == 4 * 100 * (2 + 3 / 2 + 1)
    # Half of the gradients go to the other node, and then half of the weights.
    assert limits.wire_bytes(world_of(2, 2), 100) == 4 * 100
    assert limits.wire_bytes(world_of(1, 1, 1, 1), 100) == 2 * 4 * 75


def test_what_an_average_rank_sends_is_its_part_of_its_node_s_unless_ranks_share_no_memory() -> None:
    one, two, four = world_of(2), world_of(2, 2), world_of(1, 1, 1, 1)
    assert [limits.sent_bytes(world, 100, reduction="ordered") for world in (one, two, four)] == [0, 200, 600]
    assert [limits.sent_bytes(world, 100, reduction="mpi", wire="bfloat16") for world in (one, two)] == [0, 100]
    for reduction in ("driver", "tree", "allreduce"):
        assert [limits.sent_bytes(world, 100, reduction=reduction) for world in (one, two, four)] == [400, 600, 600]


def wrong_sum(team: Team, rows: Sequence[kernels.Float32Array], out: kernels.Float32Array) -> Callable[[], object]:
    right = kernels.numpy_sum(team, rows, out)

    def run() -> None:
        right()
        out[-1] += 1e-3

    return run


def test_sums_are_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.check(Team())
    monkeypatch.setitem(kernels.WAYS, "numpy", wrong_sum)
    with pytest.raises(DisagreementError, match=r"numpy's sum of 2 rows is 0\.001 from float64's"):
        kernels.check(Team())


def test_conversions_are_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncate(team: Team, values: kernels.Float32Array, words: kernels.WordArray) -> Callable[[], object]:
        return lambda: np.copyto(words, values.view(np.uint32) >> 16, casting="unsafe")

    def forget(team: Team, words: kernels.WordArray, values: kernels.Float32Array) -> Callable[[], object]:
        return lambda: None

    with monkeypatch.context() as patched:
        patched.setitem(kernels.ROUNDINGS, "numpy", truncate)
        with pytest.raises(DisagreementError, match=r"numpy's bfloat16 is (0\.99\d|1) digits from float64's"):
            kernels.check(Team())
    monkeypatch.setitem(kernels.WIDENINGS, "torch", forget)
    with pytest.raises(DisagreementError, match="torch's float32 of bfloat16 words is not what they hold"):
        kernels.check(Team())


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345, "1,234"), (0.12345, "123"), (0.012345, "12.3"), (0.0012345, "1.23"), (0.0, "0.000")]
)
def test_milliseconds_have_three_digits(seconds: float, text: str) -> None:
    assert report.milliseconds(seconds) == text


def test_the_first_of_mpidl_s_ways_is_what_others_are_compared_with() -> None:
    assert report.baseline(["copy", "mpidl-b", "mpidl-a"]) == "mpidl-b"
    assert report.baseline(["ddp", "zero"]) == "ddp"


def test_json_has_what_all_rows_have(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    report.write_json(path, "sync", {"hosts": ["a"]}, "mpirun ...", [row("mpidl", 0.01)])
    written = json.loads(path.read_text())
    assert set(written) == {"bench", "machine", "command", "rows"}
    (only,) = written["rows"]
    assert only == {
        "case": "c", "way": "mpidl", "ranks": 2, "nodes": 1, "seconds": 0.01, "spread": [0.005, 0.02],
        "limit_seconds": 0.004, "bytes": None,
    }  # fmt: skip


@pytest.mark.parametrize("ending", picture.FORMATS)
def test_a_picture_is_drawn_of_what_was_timed(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}"
    picture.check(str(path))
    picture.draw(path, "title", [row("mpidl", 0.01), row("ddp", 0.02), row("ddp", 0.02, "d"), row("kept", None, "e")])
    assert path.read_bytes().lstrip()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg or \.pdf"):
        picture.check("x.jpeg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install matplotlib"):
        picture.check("x.png")


# --- plans ------------------------------------------------------------------------------------------------------------


def control_row(way: str, ranks: int, seconds: float, **figures: Any) -> report.Row:
    """A row of `bench plan`, of ranks that share two cores."""
    empty = dict.fromkeys(("group_size", "partitions", "entries", "calls_per_group"))
    common = {"share": seconds / 0.05, "iteration_seconds": 0.05, "ranks_per_core": max(1.0, ranks / 2)}
    spread = (seconds / 2, 2 * seconds)
    return report.row(world_of(ranks), way, way, seconds=seconds, spread=spread, **{**empty, **common, **figures})


def measured(ranks: Sequence[int] = (2, 4, 8)) -> list[report.Row]:
    """What a machine would measure of which this is true."""
    rows = []
    for number in ranks:
        crowd = max(1.0, number / 2)
        for size in (1, 10, 100):
            terms = cost_model.terms_of_group(number, size, crowd)
            seconds = GROUP.seconds(terms) / size
            rows.append(control_row("mpidl", number, seconds, group_size=size, partitions=16, calls_per_group=2.0))
        for tasks in (4, 16, 64):
            seconds = TASKS.seconds(cost_model.terms_of_tasks(tasks, crowd))
            rows.append(control_row("central", number, seconds, partitions=tasks))
        for num_bytes in (1e3, 1e6):
            latency = GROUP.coefficients["log2(ranks)"] * np.log2(number)
            seconds = crowd * (3e-5 + latency + GROUP.coefficients["a byte"] * num_bytes)
            rows.append(control_row("messages", number, seconds, bytes=num_bytes))
        for entries in (10, 10_000):
            seconds = crowd * (5e-5 + GROUP.coefficients["a rank"] * entries)
            rows.append(control_row("entries", number, seconds, entries=entries))
    return rows


GROUP = cost_model.Model(
    {"a group": 2e-4, "an iteration of it": 4e-6, "log2(ranks)": 3e-5, "a rank": 1e-7, "a byte": 5e-10}, 0.0
)
TASKS = cost_model.Model({"an iteration": 5e-5, "a task": 2e-5, "a task on a shared core": 1e-5}, 0.0)


def test_the_model_finds_what_the_figures_were_made_of() -> None:
    models = cost_model.Models.of(measured())
    assert models is not None
    for model, made_of in ((models.group, GROUP), (models.central, TASKS)):
        assert model.residual < 1e-6
        for name, coefficient in made_of.coefficients.items():
            assert model.coefficients[name] == pytest.approx(coefficient, rel=1e-3), name
    on_ten_thousand = cost_model.terms_of_group(10_000, 50)
    assert models.group.seconds(on_ten_thousand) == pytest.approx(GROUP.seconds(on_ten_thousand), rel=1e-3)


def test_no_coefficient_is_negative_and_errors_are_relative() -> None:
    falling = cost_model.fit([{"one": 1.0, "x": x} for x in (1.0, 2.0, 3.0)], [3.0, 2.0, 1.0])
    assert set(falling.coefficients) == {"one"}
    # The relative errors of one number for 1 and 100 are least at 1.0099, not at their mean.
    model = cost_model.fit([{"one": 1.0}] * 2, [1.0, 100.0])
    assert model.coefficients["one"] == pytest.approx((1 + 0.01) / (1 + 0.0001))
    assert model.residual == pytest.approx(np.sqrt(((1.0099 - 1) ** 2 + (0.010099 - 1) ** 2) / 2), rel=1e-3)


def test_fewer_than_three_numbers_of_ranks_give_no_model() -> None:
    assert cost_model.Models.of(measured((2, 4))) is None
    parsed = cli.parse(["bench", "plan"])
    assert "three numbers of ranks" in plan_tables.notes(parsed, None)[-1]


def test_the_model_is_told_with_its_residual_and_what_it_takes_for_granted() -> None:
    models = cost_model.Models(GROUP, TASKS)
    group, central, *assumptions = models.told()
    assert "200 a group + 4 an iteration of it + 30 log2(ranks)" in group
    assert central.endswith("50 an iteration + 20 a task, in microseconds; residual 0 %")
    assert len(assumptions) == len(cost_model.ASSUMPTIONS)


def test_tables_join_all_numbers_of_ranks_and_compare_at_the_same_partitions() -> None:
    by_size, by_partitions = plan_tables.tables(measured(), [], (10, 16))
    assert [row[:2] for row in by_size.rows] == [(str(n), str(g)) for n in (2, 4, 8) for g in (1, 10, 100)]
    assert all(row[-2] == "2" for row in by_size.rows)
    assert [row[:2] for row in by_partitions.rows] == [(str(n), "16") for n in (2, 4, 8)]
    group, task = GROUP.seconds(cost_model.terms_of_group(2, 10)) / 10, TASKS.seconds(cost_model.terms_of_tasks(16))
    assert float(by_partitions.rows[0][-1]) == pytest.approx(task / group, rel=0.01)


@pytest.mark.parametrize(("share", "text"), [(0.00004, "0.004 %"), (0.0123, "1.2 %"), (0.5, "50 %"), (5.63, "563 %")])
def test_shares_have_two_digits(share: float, text: str) -> None:
    assert plan_tables.percent(share) == text


@pytest.mark.parametrize(
    ("group_sizes", "partitions", "compared"),
    [([1, 50, 99], [4, 256, 512], (50, 256)), ([3, 200, 7], [256], (200, 256)), ([50], [8, 16], (50, 16))],
)
def test_both_are_compared_at_the_usual_sizes_or_at_the_largest(
    group_sizes: list[int], partitions: list[int], compared: tuple[int, int]
) -> None:
    assert plan.compared(group_sizes, partitions) == compared


def test_large_jobs_are_told_for_both_with_a_partition_a_rank() -> None:
    said = plan.predictions(cost_model.Models(GROUP, TASKS), 50)
    assert [(r["ranks"], r["partitions"], r["way"]) for r in said] == [
        (ranks, ranks, way) for ranks in (1_000, 10_000) for way in ("mpidl", "central")
    ]
    assert said[2]["seconds"] == pytest.approx(
        (2e-4 + 50 * 4e-6 + 3e-5 * np.log2(10_000) + 1e-3 + 5e-10 * Groups.bytes_of(50, 10_000)) / 50
    )
    assert said[3]["seconds"] == pytest.approx(5e-5 + 10_000 * 2e-5)


def test_earlier_figures_are_read_without_what_models_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = measured()
    report.write_json(path, "plan", {}, "mpirun ...", [*rows, control_row("mpidl", 1000, 1.0) | {"case": plan.MODEL}])
    assert plan.read_rows(path) == json.loads(json.dumps(rows))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"bench": "sync", "rows": []}', '{"bench": "plan"}', '{"bench": "plan", "rows": [{}]}']
)
def test_a_file_that_is_not_of_this_benchmark_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--with {path} "):
        plan.read_rows(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        plan.read_rows(tmp_path / "none.json")


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    curves.draw(path, "title", joined=measured(), compared=(10, 16))
    assert path.read_bytes().startswith(b"\x89PNG")
