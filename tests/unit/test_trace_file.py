"""Claims about the trace's file and what is recorded for it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from mpidl.runtime.spans import Spans
from mpidl.telemetry.trace_file import Clock, RankTrace, events, write_trace


def test_a_clock_that_is_ahead_and_drifts_is_aligned() -> None:
    clock = Clock(began=100.0, began_offset=50.0, ended=200.0, ended_offset=51.0)
    assert [clock.aligned(at) for at in (100.0, 150.0, 200.0)] == pytest.approx([50.0, 99.5, 149.0])
    assert Clock(began=1.0, began_offset=2.0, ended=1.0, ended_offset=2.0).aligned(5.0) == 3.0


def test_ranks_are_processes_and_tracks_are_threads_with_outer_spans_first(tmp_path: Path) -> None:
    first = RankTrace("rank 0 (a)", Clock(), [("plans", "plan", 10.2, 10.4), ("main thread", "forward", 10.0, 10.1),
                                             ("main thread", "iteration 1", 10.0, 10.5)])  # fmt: skip
    ahead = Clock(began=1010.0, began_offset=1000.0, ended=1011.0, ended_offset=1000.0)
    second = RankTrace("rank 1 (b)", ahead, [("main thread", "iteration 1", 1010.0, 1010.5)])
    path = tmp_path / "trace.json"
    write_trace(path, [first, second], {"clock_error_us": 3.0})
    written = json.loads(path.read_text())
    assert written["otherData"] == {"clock_error_us": 3.0}
    spans = [each for each in written["traceEvents"] if each["ph"] == "X"]
    assert [(each["pid"], each["tid"], each["name"]) for each in spans] == [
        (0, 0, "iteration 1"), (0, 0, "forward"), (0, 2, "plan"), (1, 1, "iteration 1"),
    ]  # fmt: skip
    assert [each["ts"] for each in spans] == pytest.approx([0.0, 0.0, 2e5, 0.0])
    assert spans[0]["dur"] == pytest.approx(5e5)
    names = {(each["pid"], each.get("tid")): each["args"]["name"] for each in written["traceEvents"]
             if each["name"] in ("process_name", "thread_name") and each["name"] == "thread_name"}  # fmt: skip
    assert names == {(0, 0): "main thread", (0, 2): "plans", (1, 1): "main thread"}


def test_no_two_threads_have_one_number_and_main_threads_have_their_process_s() -> None:
    """Perfetto makes of a thread 0 the main thread, with the process's number: rank 1 must have no other thread 1."""
    tracks = ("buckets: allgather 1", "main thread", "plans on their way")
    ranks = [RankTrace(f"rank {rank}", Clock(), [(track, "a", 0.0, 1.0) for track in tracks]) for rank in range(5)]
    named = [each for each in events(ranks) if each["name"] == "thread_name"]
    numbers = [each["tid"] for each in named]
    assert len(set(numbers)) == len(numbers) == 15
    mains = [(each["pid"], each["tid"]) for each in named if each["args"]["name"] == "main thread"]
    assert mains == [(rank, rank) for rank in range(5)]


@pytest.mark.parametrize("seed", range(5))
def test_no_reader_s_rounding_takes_spans_apart(seed: int) -> None:
    """Those that touch still touch, and none ends after its outer one, in float64 and in whole nanoseconds."""
    generator = random.Random(seed)
    cuts = sorted(generator.uniform(50.0, 51.0) for _ in range(400))
    inner = [("main thread", f"{at}", began, ended) for at, (began, ended) in enumerate(itertools.pairwise(cuts))]
    ranks = [RankTrace("rank 0", Clock(0.0, 1e-3, 100.0, 3e-3), [*inner, ("main thread", "outer", cuts[0], cuts[-1])])]
    spans = [each for each in events(ranks) if each["ph"] == "X"]
    assert [each["name"] for each in spans] == ["outer", *(name for _, name, *_ in inner)]
    for scale in (1, 1000):  # microseconds, as they are; nanoseconds, cut off
        kind = float if scale == 1 else int
        placed = [(kind(each["ts"] * scale), kind(each["dur"] * scale)) for each in spans]
        assert placed[0][0] + placed[0][1] == placed[-1][0] + placed[-1][1]
        assert all(ts + dur == later for (ts, dur), (later, _) in itertools.pairwise(placed[1:]))


def test_a_file_of_many_parts_and_one_of_none_are_json(tmp_path: Path) -> None:
    spans = [("main thread", "a", float(at), at + 0.5) for at in range(10_000)]
    for each in (spans, []):
        ranks = [RankTrace("rank 0", Clock(), each)] if each else []
        write_trace(tmp_path / "trace.json", ranks, {})
        assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == len(list(events(ranks)))


def test_nothing_is_recorded_before_a_trace_begins_and_after_it_ends() -> None:
    spans = Spans()
    with spans.within("main thread", "before"):
        pass
    spans.begin()
    with spans.within("main thread", "inside"):
        pass
    (recorded,) = spans.end()
    assert recorded[:2] == ("main thread", "inside")
    assert recorded[2] <= recorded[3]
    with spans.within("main thread", "after"):
        pass
    assert spans.end() == []
