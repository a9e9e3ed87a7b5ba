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

from mpidl import cli
from mpidl.bench import cases, kernels, limits, picture, report
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


def test_a_model_without_image_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn:ReLU has no attribute image_shape"):
        cases.build_model("torch.nn:ReLU")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sync", "--repeats", "0"], "argument --repeats: '0' is not a number above 0 without decimals"),
        (["sync", "--millions", "nan"], "argument --millions: 'nan' is not a number above 0"),
        (["step", "--batch", "1.5"], "argument --batch: '1.5'"),
        (["step", "--millions", "1"], "unknown argument --millions"),
        (["sync", "--milions", "1"], "unknown argument --milions; did you mean --millions"),
        (["sync", "--optimizer", "lars"], "choose from"),
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
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'mpidl\[bench\]'"):
        picture.check("x.png")
