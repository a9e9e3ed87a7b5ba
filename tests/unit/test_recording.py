"""Plans written down, read and repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.scheduling import Action, Group, GroupPlan, Header, PlanLog, Replay, read_recording
from mpidl.scheduling.triggers import Facts

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
    log.close()
    return run_dir


def test_groups_are_read_as_they_were_written(tmp_path: Path) -> None:
    groups = [
        group(0, 3, 3, (2, Action.CHECKPOINT), (3, Action.VALIDATE)),
        group(3, 2),
        group(5, 5, 1, (6, Action.END)),
    ]
    found = read_recording(written(tmp_path, *groups))
    assert found.groups == groups
    assert found.headers == [HEADER]


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
    replay = Replay(found, world_size=2)
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
    found.check(HEADER, validates=True)
    for change, message in (
        ({"partitions": 8}, "made for partitions 4, this run has 8"),
        ({"seed": 5}, "made for seed 0, this run has 5"),
        ({"clip_norm": 1.0}, "made for clip_norm None, this run has 1.0"),
        ({"world_size": 3}, "made for 2 ranks, this run has 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            found.check(dataclasses.replace(HEADER, **change), validates=True)
    found.check(dataclasses.replace(HEADER, num_nodes=2, epochs=9, mpidl="1"), validates=True)


def test_plans_of_a_run_that_went_on_with_another_setting_are_refused(tmp_path: Path) -> None:
    log = PlanLog(tmp_path, dataclasses.replace(HEADER, clip_norm=5.0))
    log.write(group(0, 3))
    log.close()
    found = read_recording(written(tmp_path, group(3, 2)))
    with pytest.raises(ConfigError, match="was resumed with another clip_norm; a run can be repeated that had one"):
        found.check(HEADER, validates=True)


@pytest.mark.parametrize("firsts", [(3,), (0, 4), (0, 3, 7)])
def test_plans_with_holes_are_refused(tmp_path: Path, firsts: tuple[int, ...]) -> None:
    found = read_recording(written(tmp_path, *(group(first, 3) for first in firsts)))
    with pytest.raises(ConfigError, match=r"lack the iterations \d+ to \d+"):
        found.check(HEADER, validates=True)


def test_validations_need_a_validation_set_and_checkpoints_a_directory(tmp_path: Path) -> None:
    found = read_recording(written(tmp_path, group(0, 3, 3, (1, Action.VALIDATE), (2, Action.CHECKPOINT))))
    with pytest.raises(ConfigError, match="had validations"):
        found.check(HEADER, validates=False)
    assert found.triggers(10, 2, keeps=False).checkpoint is None
    assert found.triggers(10, 2, keeps=True).checkpoint is not None


def test_a_run_that_ended_and_was_then_lengthened_ends_where_it_did_at_last(tmp_path: Path) -> None:
    acts = ((3, Action.VALIDATE), (3, Action.ONLY_AT_END), (3, Action.END))
    found = read_recording(written(tmp_path, group(0, 3, 3, *acts), group(3, 2, 2, (5, Action.VALIDATE))))
    made = found.triggers(10, 2, keeps=True)
    assert made.end is None
    assert not found.has_ended
    assert made.validate is not None
    assert [at for at in range(1, 6) if made.validate.holds(Facts(at, 10))] == [5]


def test_a_group_so_far_is_replaced_by_the_whole_and_cut_by_a_resumed_run(tmp_path: Path) -> None:
    log = PlanLog(tmp_path, HEADER)
    log.write(group(0, 6, 2, (2, Action.CHECKPOINT)))
    log.write(group(0, 6, 4, (2, Action.CHECKPOINT), (4, Action.CHECKPOINT)))
    log.close()
    assert [(each.done, len(each.acts)) for each in read_recording(tmp_path).groups] == [(4, 2)]
    with (tmp_path / "plans.jsonl").open("a") as file:
        file.write('{"index": 3, "ep')  # killed here
    written(tmp_path, group(2, 3))
    found = read_recording(tmp_path)
    assert [(each.plan.first_iteration, each.done) for each in found.groups] == [(0, 2), (2, 3)]
    assert len(found.headers) == 2
    found.check(HEADER, validates=True)


def test_parts_that_other_ranks_have_run_are_dealt_out_evenly(tmp_path: Path) -> None:
    first, second = group(0, 3), group(3, 2)
    other = dataclasses.replace(first.plan, assignment=Assignment(4, (0, 1, 2, 4)))
    log = PlanLog(tmp_path, dataclasses.replace(HEADER, world_size=3))
    log.write(dataclasses.replace(first, plan=other))
    log.close()
    found = read_recording(written(tmp_path, second))
    found.check(HEADER, validates=True)
    replay = Replay(found, world_size=2)
    assert replay.next_plan().assignment == Assignment(4, (0, 2, 4))
    assert replay.next_plan().assignment == second.plan.assignment


def test_the_last_plan_of_a_stopped_run_waits_for_no_other(tmp_path: Path) -> None:
    replay = Replay(read_recording(written(tmp_path, group(0, 3))), world_size=2)
    assert replay.next_plan().actions == Action.VALIDATE | Action.END
