"""Scaling without MPI: sizes, samples, efficiencies, layers' times and the waits made of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mpidl import cli
from mpidl.bench import scaling_report, step, waits
from mpidl.bench.cases import OPTIMIZERS, Batches, build_model, samples_for
from mpidl.bench.report import Row, row
from mpidl.bench.scaling_sizes import check_global_batch, check_node_counts, cut, sizes_of, with_efficiency
from mpidl.bench.step import LOSS
from mpidl.bench.step_ways import MPIDL, Mpidl
from mpidl.bench.waits import Layer, Pace, Waiting, course_of, measure_course, seconds_of
from mpidl.errors import ConfigError
from mpidl.report_page import scaling as report_scaling


def made_row(way: str, nodes: int, seconds: float, mode: str = "weak", ranks_per_node: int = 2) -> Row:
    ranks = nodes * ranks_per_node
    world: Any = SimpleNamespace(size=ranks, num_nodes=nodes)
    samples = 8 * ranks if mode == "weak" else 64
    return row(
        world, mode, way, seconds=seconds, spread=(seconds, seconds), samples_per_s=samples / seconds, batch=8,
        model="lenet5", global_batch=samples, exposed_seconds=seconds, wire_gbit=1.0 if nodes > 1 else None,
    )  # fmt: skip


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node_sizes", "expected"),
    [
        ([1], [(1, 1)]),
        ([4], [(1, 1), (1, 2), (1, 4)]),
        ([6], [(1, 1), (1, 2), (1, 4), (1, 6)]),
        ([1, 1], [(1, 1), (2, 2)]),
        ([3, 1, 2], [(1, 3), (2, 4), (3, 6)]),
        ([2] * 8, [(1, 2), (2, 4), (4, 8), (8, 16)]),
    ],
)
def test_sizes_double_up_to_all_nodes_or_to_all_ranks_of_one(
    node_sizes: list[int], expected: list[tuple[int, int]]
) -> None:
    sizes = sizes_of(node_sizes, ["weak", "strong"], 16, 50)
    assert [(size.nodes, size.ranks) for size in sizes] == expected
    for size in sizes:
        assert size.samples == {"weak": 16 * size.ranks, "strong": 50}
        assert size.batches("weak") == (16, 16)
        owns = [cut(50, size.ranks, rank) for rank in range(size.ranks)]
        assert sum(owns) == 50
        assert (min(owns), max(owns)) == size.batches("strong")


def test_a_global_batch_that_does_not_go_around_is_refused_with_both_numbers() -> None:
    check_global_batch(None, ["weak"], 8)
    check_global_batch(8, ["strong"], 8)
    with pytest.raises(ConfigError, match=r"7 sample\(s\) of --global-batch but 8 ranks"):
        check_global_batch(7, ["weak", "strong"], 8)
    with pytest.raises(ConfigError, match="--global-batch is for strong scaling"):
        check_global_batch(64, ["weak"], 8)


def test_chosen_numbers_of_nodes_have_all_their_ranks_and_the_samples_of_the_whole_run() -> None:
    for node_sizes, counts, expected in (
        ([3, 1, 2], [2], [(2, 4)]),
        ([3, 1, 2], [1, 3], [(1, 3), (3, 6)]),
        ([4], [1], [(1, 4)]),
    ):
        whole = sizes_of(node_sizes, ["weak", "strong"], 16, 96)[-1]
        sizes = sizes_of(node_sizes, ["weak", "strong"], 16, 96, counts)
        assert [(size.nodes, size.ranks) for size in sizes] == expected
        assert {size.samples["strong"] for size in sizes} == {whole.samples["strong"]}
        assert [size.samples["weak"] for size in sizes] == [16 * size.ranks for size in sizes]


def test_more_nodes_than_the_run_has_are_refused_with_both_numbers() -> None:
    check_node_counts(None, 1)
    check_node_counts([1, 4], 4)
    with pytest.raises(ConfigError, match=r"--nodes 8 but this run has 4 node\(s\)"):
        check_node_counts([1, 8], 4)


def test_sizes_that_were_measured_in_files_of_their_own_join_to_the_efficiencies_of_one_run() -> None:
    rows = [made_row("mpidl-ordered", n, s, mode) for mode in ("weak", "strong") for n, s in ((1, 1.0), (2, 1.25))]
    alone = [
        each for size in (1, 2) for each in with_efficiency([r for r in rows if r["nodes"] == size], rows[0]["way"])
    ]
    assert {r["efficiency"] for r in alone} == {1.0}, "each is its own file's smallest"
    together = with_efficiency(rows, rows[0]["way"])
    for found in report_scaling.scalings(alone):
        mode = found.case.split()[0]
        expected = [r["efficiency"] for r in together if r["case"] == mode]
        assert [size.efficiency for size in found.ways["mpidl-ordered"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "2,0"], "argument --nodes: '0' is not a number above 0"),
        (["--modes", "weak,string"], "argument --modes: 'string' is not one of weak, strong"),
        (["--compute-ms", "0"], "argument --compute-ms: '0' is not a number above 0"),
        (["--compute-ms", "5", "--waits"], "not allowed with argument"),
        (["--global-batch", "1.5"], "argument --global-batch: '1.5'"),
        (["--group-sizes", "1"], "unknown argument --group-sizes"),
    ],
)
def test_wrong_flags_are_told_in_words(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(["bench", "scaling", *flags])
    assert message in str(caught.value)


# --- efficiency -------------------------------------------------------------------------------------------------------


def test_efficiency_is_to_the_baseline_on_the_smallest_size_of_the_same_mode() -> None:
    weak = [made_row("a", 4, 1.25), made_row("a", 1, 1.0), made_row("b", 1, 2.0), made_row("b", 4, 4.0)]
    strong = [made_row("a", 1, 8.0, "strong"), made_row("a", 4, 2.5, "strong")]
    found = with_efficiency([*weak, *strong], "a")
    assert [r["efficiency"] for r in found] == pytest.approx([0.8, 1.0, 0.5, 0.25, 1.0, 0.8])
    assert {r["baseline"] for r in found} == {"a"}


def test_the_graph_has_a_panel_a_mode_and_the_table_a_line_a_row(tmp_path: Path) -> None:
    ways = ["mpidl-ordered", "mpidl-driver"]
    rows = [made_row(way, n, 1.0 + n, mode) for mode in ("weak", "strong") for way in ways for n in (1, 2, 4)]
    rows = with_efficiency(rows, ways[0])
    assert scaling_report.unit_of(rows) == "nodes"
    assert scaling_report.unit_of(rows[:1]) == "ranks"
    scaling_report.draw(tmp_path / "x.png", "title", rows=rows)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    one = [r for r in rows if r["nodes"] == 1]
    told = "1 node(s), 2 rank(s), weak, ms: mpidl-ordered 2,000, mpidl-driver 2,000"
    assert scaling_report.progress(one) == told
    table = scaling_report.table([r for r in rows if r["case"] == "weak"])
    assert len(table.rows) == 6
    assert table.rows[1][7] == "67 %", "2 s at one node, 3 s at two"


def test_the_notes_say_where_compute_and_link_rate_are_from() -> None:
    courses = {8: (Layer("x", 0.1, 0.2),)}
    rows = [made_row("a", 2, 1.0)]
    for flags, words in (
        ([], ["compute of one rank alone: 8 samples 300 ms", "Gbit/s: 1 on 2 nodes"]),
        (["--waits"], ["waits in place of compute, as long as one rank alone needed"]),
        (["--compute-ms", "300", "--wire-gbit", "2.5"], ["as --compute-ms says", "Gbit/s: 2.5, given"]),
    ):
        told = "\n".join(scaling_report.notes(cli.parse(["bench", "scaling", *flags]), courses, rows))
        assert all(word in told for word in words)


# --- layers and waits -------------------------------------------------------------------------------------------------


def test_layers_times_add_up_to_the_iteration_and_none_is_negative() -> None:
    begun = [("a", 1.0), ("b", 2.0), ("a", 4.0), ("c", 5.0)]
    ready = {"c": 11.0, "a": 13.0, "b": 12.5}  # b's gradient comes while a's is computed; nothing is ever earlier
    course = course_of(begun, ready, (0.0, 10.0, 14.0))
    assert course == (Layer("a", 2.0 + 1.0, 0.5 + 1.0), Layer("b", 2.0, 1.5), Layer("c", 5.0, 1.0))
    assert seconds_of(course) == 14.0
    late = course_of(begun, {"c": 13.0, "b": 12.0}, (0.0, 10.0, 14.0))
    assert [layer.backward_s for layer in late] == [1.0, 0.0, 3.0]


def test_the_layers_of_a_model_are_found_in_the_order_of_forward() -> None:
    model = build_model("lenet5")
    course = measure_course(model, LOSS, samples_for(model, 2, 0))
    assert [layer.name for layer in course] == list(waits.with_parameters(model))
    assert all(layer.forward_s > 0 and layer.backward_s >= 0 for layer in course)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_waits_pass_through_the_layers_forth_and_back_and_give_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def sleep(seconds: float) -> float:
        told.append(seconds)
        return seconds

    monkeypatch.setattr(waits, "pause", sleep)
    model = build_model("lenet5")
    names = list(waits.with_parameters(model))
    shapes = [parameter.shape for parameter in model.parameters()]
    course = tuple(Layer(name, 1.0 + index, 10.0 + index) for index, name in enumerate(names))
    waiting = Waiting(model, {3: course})
    assert [parameter.shape for parameter in waiting.parameters()] == shapes
    for layer, module in zip(names, waiting._layers, strict=True):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: told.append(layer))
    samples, targets = samples_for(waiting, 3, 0)
    LOSS(waiting(samples), targets).backward()
    forward, backward = [layer.forward_s for layer in course], [layer.backward_s for layer in course]
    assert told[: len(course)] == forward
    rest = told[len(course) :]
    assert [each for each in rest if isinstance(each, float)] == backward[::-1]
    assert [each for each in dict.fromkeys(rest) if isinstance(each, str)] == names[::-1]
    for each in course:  # its gradients come after its own wait, before the next one's
        assert rest.index(each.name) == rest.index(each.backward_s) + 1
    assert all(torch.count_nonzero(p.grad) == 0 for p in waiting.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in waiting.parameters())


def test_a_sleep_that_lasts_too_long_is_taken_off_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def oversleep(seconds: float) -> float:
        asked.append(seconds)
        return seconds + 0.5

    monkeypatch.setattr(waits, "pause", oversleep)
    pace = Pace()
    for _ in range(3):
        pace.wait(0.4)
    assert asked == pytest.approx([0.4, 0.3]), "the second is owed 0.1 less than nothing, so none is slept"


def test_frozen_parameters_get_no_gradient_from_waits() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    model[0].requires_grad_(False)
    waiting = Waiting(model, {1: (Layer("0", 0.0, 0.0), Layer("1", 0.0, 0.0))})
    waiting(torch.zeros(1, 2)).sum().backward()
    assert [parameter.grad is None for parameter in waiting.parameters()] == [True, True, False, False]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_a_run_goes_from_step_to_step_and_ends_with_weights_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    manager: Any = SimpleNamespace(step=lambda wait: told.append("step"), wait=lambda: told.append("wait"))
    manager.take_times = lambda: {"update": 0.0, "wait": 0.0, "local_sum": 0.0}
    monkeypatch.setattr("mpidl.bench.step_ways.ParameterManager", lambda *_, **__: manager)
    world: Any = SimpleNamespace(rank=0, size=1, local_size=1, num_nodes=1)
    model = build_model("lenet5")
    way = Mpidl(world, model, OPTIMIZERS["sgd"], **MPIDL["mpidl-ordered"])
    loop = step.Loop(world, way, Batches(model, 2, 0), 3)
    loop.prepare()
    assert told == ["step"]
    loop.run()
    assert told == ["step"] * 4
    assert loop.phases[0]["forward"] > 0
    manager.close = lambda: told.append("close")
    loop.rest()
    loop.close()
    assert told[4:] == ["wait", "close"]
