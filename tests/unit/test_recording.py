"""Plans written down, read and repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.scheduling import Action, Group, GroupPlan, Header, PlanLog, Replay, read_recording

HEADER = Header(num_samples=100, batch_size=10, epochs=2, partitions=4, world_size=2)


def group(first: int, size: int, done: int | None = None, *acts: tuple[int, Action]) -> Group:
    plan = GroupPlan(
        index=first,
        epoch=first // 10,
        first_iteration=first,
        assignment=Assignment(4, (0, 1 + first % 3, 4)),
        spans=tuple((10 * i % 100, 10 * i % 100 + 10) for i in range(first, first + size)),
        learning_rates=tuple((0.1 / (1 + i), 0.3) for i in range(first, first + size)),
        actions=Action.VALIDATE | Action.WAIT if size > 2 else Action.NONE,
    )
    return Group(plan, size if done is None else done, acts)


def test_drops_are_kept_with_their_iterations_and_what_was_done_again_is_forgotten(tmp_path: Path) -> None:
    first = dataclasses.replace(group(0, 4), drops=((2, (1, 3)), (4, (0,))))
    found = read_recording(written(tmp_path, first, dataclasses.replace(group(3, 2), drops=((5, (2,)),))))
    assert found.drops == {2: (1, 3), 5: (2,)}


def written(run_dir: Path, *groups: Group) -> Path:
    log = PlanLog(run_dir, HEADER)
    for each in groups:
        log.write(each)
    return run_dir


def test_groups_are_read_as_they_were_written(tmp_path: Path) -> None:
    groups = [
        group(0, 3, 3, (2, Action.CHECKPOINT), (3, Action.VALIDATE)),
        group(3, 2),
        group(5, 5, 1, (6, Action.END)),
    ]
    found = read_recording(written(tmp_path, *groups))
    assert found.groups == groups
    assert found.header == HEADER


def test_what_a_resumed_run_did_again_counts_as_it_did_it_last(tmp_path: Path) -> None:
    written(tmp_path, group(0, 4, 4, (2, Action.CHECKPOINT), (4, Action.VALIDATE)), group(4, 4, 3))
    found = read_recording(written(tmp_path, group(2, 3), group(5, 1)))
    assert [(each.plan.first_iteration, each.done, each.acts) for each in found.groups] == [
        (0, 2, ((2, Action.CHECKPOINT),)),
        (2, 3, ()),
        (5, 1, ()),
    ]


def test_a_replay_gives_the_plans_as_far_as_they_were_carried_out(tmp_path: Path) -> None:
    groups = [group(0, 3), group(3, 5, 2), group(5, 2, 1)]
    found = read_recording(written(tmp_path, *groups))
    assert found.largest_group == 3
    replay = Replay(found)
    plans = [replay.next_plan() for _ in groups]
    for index, (plan, each) in enumerate(zip(plans, groups, strict=True)):
        assert plan.index == index
        assert plan.assignment == each.plan.assignment
        assert plan.spans == each.plan.spans[: each.done]
        assert plan.learning_rates == each.plan.learning_rates[: each.done]
        assert (Action.END in plan.actions) == (index == 2)


def test_the_last_line_of_a_killed_run_is_left_out_and_any_other_damage_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, group(0, 3), group(3, 2)) / "plans.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    assert len(read_recording(tmp_path).groups) == 1
    lines = text.splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]))
    with pytest.raises(ConfigError, match=r"plans.jsonl, line 2 is damaged"):
        read_recording(tmp_path)
    path.write_text("\n".join([lines[0], json.dumps({"index": 1}), lines[2]]))
    with pytest.raises(ConfigError, match=r"plans.jsonl, line 2 is damaged: KeyError"):
        read_recording(tmp_path)


@pytest.mark.parametrize("lines", [None, 0, 1])
def test_a_run_without_plans_is_told(tmp_path: Path, lines: int | None) -> None:
    if lines is not None:
        path = written(tmp_path) / "plans.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(ConfigError, match="has no plans to read|holds no group"):
        read_recording(tmp_path)


def test_plans_of_another_run_are_refused(tmp_path: Path) -> None:
    found = read_recording(written(tmp_path, group(0, 3)))
    found.check(HEADER)
    with pytest.raises(ConfigError, match="made for partitions 4, this run has 8"):
        found.check(Header(100, 10, 2, 8, 2))
    with pytest.raises(ConfigError, match="begin at iteration 3, not 0"):
        (tmp_path / "later").mkdir()
        read_recording(written(tmp_path / "later", group(3, 3))).check(HEADER)
