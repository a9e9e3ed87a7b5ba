"""`mpidl launch` beside a launcher that is a shell script: what is started, how ends are judged, what is passed on."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpidl import cli, local_folder
from mpidl.errors import EXIT_LOST, ConfigError, LaunchError
from mpidl.launching.verdict import MOST_STARTS, STOPPED, Count, End, judge

pytestmark = pytest.mark.launches

PATIENCE_S = 30.0
ANNOUNCED = r" --announced (\S+)/([0-9a-f]{32})/([01])"

Launcher = Callable[..., str]
"""Of what the first, the second, ... start does, in shell; gives the launcher's command."""

BEGIN = 'touch "$run/config.new" && mv "$run/config.new" "$run/config.toml"; '
CHECKPOINT = (
    'mkdir -p "$run/checkpoints/epoch-00000$number" && touch "$run/checkpoints/epoch-00000$number/manifest.json"; '
)
LOSE = """echo '{"rank": 2, "host": "node07", "process": 5, "code": -9}' >"$run/ends/rank-00002.json"; exit 137"""
FINISH = 'touch "$run/FINISHED"'
NEXT = (
    'for gate; do :; done; touch "$gate.ready"; while [ ! -e "$gate.word" ]; do sleep 0.05; done; '
    'cat "$gate.word" >>"$lines.words"; echo >>"$lines.words"; grep -q go "$gate.word" || exit 0; '
)
"""As ranks do that get ready beside others."""
NEVER = 'echo $$ >"$lines.new"; mv "$lines.new" "$lines.2"; while :; do sleep 0.05; done'
"""As those that do not get so far."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def launcher(tmp_path: Path, run_dir: Path) -> Launcher:
    def make(*starts: str) -> str:
        cases = "\n".join(f"{number}) {start} ;;" for number, start in enumerate(starts, 1))
        script = tmp_path / "launcher"
        script.write_text(
            f"#!/bin/sh\nrun='{run_dir}' lines='{tmp_path}/lines'\nprintf '%s\\n' \"$*\" >>\"$lines\"\n"
            f'number=$(wc -l <"$lines")\ncase $number in\n{cases}\nesac\n'
        )
        script.chmod(0o755)
        return str(script)

    return make


def lines(tmp_path: Path) -> list[str]:
    """What the launcher was started with, but for what is announced to ranks."""
    return re.sub(ANNOUNCED, "", (tmp_path / "lines").read_text()).splitlines()


def launched(launcher: str, run_dir: Path, *options: str) -> int:
    return cli.main(["launch", "-n", "3", "--mpirun", launcher, *options, "mpidl", "train", "--run-dir", str(run_dir)])


def test_a_lost_rank_is_named_and_the_training_resumed_in_its_run_directory(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(launcher(BEGIN + CHECKPOINT + LOSE, FINISH), run_dir) == 0
    assert lines(tmp_path) == [f"-n 3 mpidl train --run-dir {run_dir}", f"-n 3 mpidl train --resume {run_dir}"]
    told = capfd.readouterr().err
    assert "lost rank 2 on node07; starts again from epoch-000001 on 3 ranks; restarts left: 2" in told
    assert not (run_dir / "ends").exists()


def test_a_training_killed_before_its_run_began_starts_as_it_did(
    launcher: Launcher, run_dir: Path, tmp_path: Path
) -> None:
    assert launched(launcher(LOSE, FINISH), run_dir) == 0
    assert lines(tmp_path) == 2 * [f"-n 3 mpidl train --run-dir {run_dir}"]


def test_an_earlier_run_in_the_directory_is_not_gone_on_with(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir()
    (run_dir / "config.toml").touch()
    assert launched(launcher(LOSE, "exit 2"), run_dir) == 2
    assert lines(tmp_path) == 2 * [f"-n 3 mpidl train --run-dir {run_dir}"]
    assert (run_dir / "config.toml").exists()


def test_what_killed_ranks_have_kept_is_removed_from_all_nodes_in_the_end(
    launcher: Launcher, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_folder, "DIRECTORY", tmp_path)
    name = local_folder.name_of(run_dir)
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    kept = BEGIN + told(2)
    assert launched(launcher(kept + LOSE, LOSE, "exit 0"), run_dir, "--restarts", "1") == 137
    assert lines(tmp_path)[1:] == [f"-n 3 mpidl train --resume {run_dir}", f"-n 3 rm -rf -- {tmp_path / name}"]
    assert not (tmp_path / name).exists()


def told(num_nodes: int, host: str = platform.node()) -> str:
    """What rank 0 tells of what is kept."""
    told = json.dumps({"num_nodes": num_nodes, "host": host, "iteration": 7})
    return f"""echo '{told}' >"$run/ends/kept.json"; """


@pytest.mark.parametrize(
    ("last", "is_removed"),
    [(told(2), True), (told(1, "node07"), True), (told(1), False), (told(2) + told(0), False), ("", True)],
    ids=["two nodes", "another node", "this node", "ranks have removed it", "not told again"],
)
def test_the_launcher_removes_what_is_kept_where_nobody_else_does(
    launcher: Launcher, run_dir: Path, tmp_path: Path, last: str, is_removed: bool
) -> None:
    assert launched(launcher(BEGIN + told(2) + LOSE, last + LOSE, "exit 0"), run_dir, "--restarts", "1") == 137
    assert len(lines(tmp_path)) == 2 + is_removed


def test_all_ranks_of_a_launch_and_no_others_are_told_where_to_keep_their_state(
    launcher: Launcher, run_dir: Path, tmp_path: Path
) -> None:
    started = launcher(LOSE, BEGIN + LOSE, FINISH, FINISH)
    assert [launched(started, run_dir) for _ in range(2)] == [0, 0]
    told = re.findall(ANNOUNCED, (tmp_path / "lines").read_text())
    assert [name for name, _, _ in told] == 4 * [local_folder.name_of(run_dir)]
    keys = [key for _, key, _ in told]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert [is_restart for *_, is_restart in told] == ["0", "0", "1", "0"], "the first start had begun nothing"


def test_nothing_is_to_be_kept_without_restarts(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    assert launched(launcher('[ -d "$run/ends" ] && ' + FINISH), run_dir, "--restarts", "0") == 0
    assert "--announced" not in (tmp_path / "lines").read_text()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_rank_that_left_without_a_word_is_named_and_the_training_started_again(
    code: int, launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = json.dumps({"rank": 1, "host": "node07", "process": 5, "size": 3, "code": code})
    leave = f"""{BEGIN} echo '{facts}' >"$run/ends/rank-00001.json"; exit {code}"""
    mpirun = launcher(leave, leave)
    assert launched(mpirun, run_dir, "--restarts", "1") == (code if code == 1 else EXIT_LOST)
    assert len(lines(tmp_path)) == 2
    told = capfd.readouterr().err
    assert "lost rank 1 on node07; starts again from the beginning" in told
    assert "lost rank 1 on node07; no restarts are left; " in told
    assert f"; mpidl launch --mpirun {mpirun} -n 3 --restarts 1 mpidl train --resume {run_dir} goes on" in told


def test_a_rank_that_said_why_it_left_is_not_lost(
    launcher: Launcher, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = json.dumps({"rank": 1, "host": "node07", "process": 5, "size": 3, "has_said": 1, "code": 3})
    leave = f"""{BEGIN} echo '{facts}' >"$run/ends/rank-00001.json"; exit 3"""
    assert launched(launcher(leave), run_dir) == 3
    assert "lost" not in capfd.readouterr().err


def test_restarts_without_progress_are_bounded(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(launcher(*5 * [BEGIN + LOSE]), run_dir, "--restarts", "9") == 137
    assert len(lines(tmp_path)) == MOST_STARTS
    told = capfd.readouterr().err
    assert f"no new checkpoint in {MOST_STARTS} starts in a row: gives up" in told
    assert f" -n 3 --restarts 9 mpidl train --resume {run_dir} goes on" in told


def test_there_are_as_many_restarts_as_were_asked_for(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(launcher(*5 * [BEGIN + CHECKPOINT + LOSE]), run_dir, "--restarts", "1") == 137
    assert len(lines(tmp_path)) == 2
    assert "lost rank 2 on node07; no restarts are left; " in capfd.readouterr().err


def test_nothing_is_restarted_where_the_launcher_fails_before_a_rank_begins(
    launcher: Launcher, run_dir: Path, tmp_path: Path
) -> None:
    assert launched(launcher("exit 255"), run_dir) == 255
    assert len(lines(tmp_path)) == 1
    assert not run_dir.exists()


def test_the_file_finished_of_an_earlier_run_does_not_count(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir()
    (run_dir / "FINISHED").touch()
    assert launched(launcher(BEGIN + CHECKPOINT + LOSE, "exit 0"), run_dir, "--restarts", "1") == 1
    assert len(lines(tmp_path)) == 2


def test_the_file_ranks_has_others_get_ready_and_take_the_place_of_those_that_train(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} trap '{CHECKPOINT} exit {STOPPED}' USR1; {ask(5)} while :; do sleep 0.05; done"""
    assert launched(launcher(wait, NEXT + FINISH), run_dir, "--restarts", "0") == 0
    assert lines(tmp_path)[1] == f"-n 5 mpidl train --resume {run_dir} --standby {run_dir}/ends/gate-1"
    assert not (run_dir / "RANKS").exists()
    told = capfd.readouterr().err
    assert "5 ranks get ready, while training goes on" in told
    assert "starts again from epoch-000001 on 5 ranks" in told
    assert words(tmp_path) == ["go"]


def test_under_srun_ranks_stop_before_others_start(tmp_path: Path, launcher: Launcher, run_dir: Path) -> None:
    wait = f"""{BEGIN} trap '{CHECKPOINT} exit {STOPPED}' USR1; {ask(5)} while :; do sleep 0.05; done"""
    srun = Path(launcher(wait, FINISH)).rename(tmp_path / "srun")
    assert launched(str(srun), run_dir, "--restarts", "0") == 0
    assert lines(tmp_path)[1] == f"-n 5 mpidl train --resume {run_dir}"


def test_training_goes_on_where_other_ranks_do_not_start(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} trap 'exit 5' USR1; {ask(5)} while [ ! -e "$lines.2" ]; do sleep 0.05; done
        sleep 0.5; {CHECKPOINT} {LOSE}"""
    assert launched(launcher(wait, 'touch "$lines.2"; exit 9', FINISH), run_dir, "--restarts", "1") == 0
    told = capfd.readouterr().err
    assert "5 ranks did not start (code 9); nothing is changed, training goes on" in told
    assert "lost rank 2 on node07; starts again from epoch-000001 on 3 ranks; restarts left: 0" in told
    assert len(lines(tmp_path)) == 3


def test_ranks_that_are_ready_for_a_training_that_ends_leave(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    wait = f"""{BEGIN} trap '{FINISH}; exit 0' USR1; {ask(5)} while :; do sleep 0.05; done"""
    assert launched(launcher(wait, NEXT + "exit 5"), run_dir) == 0
    assert words(tmp_path) == ["leave"]


@pytest.mark.parametrize(("number", "told"), [(2, "2 ranks get ready"), (3, "RANKS says 3, as many as there are")])
def test_another_number_replaces_the_one_before(
    number: int, told: str, launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} trap '{CHECKPOINT} exit {STOPPED}' USR1; {ask(5)} while [ ! -e "$lines.2" ]; do sleep 0.05; done
        {ask(number)} while [ -e "$run/RANKS" ] || [ {number} = 2 ]; do sleep 0.05; done; {FINISH}"""
    assert launched(launcher(wait, NEVER, NEXT + FINISH), run_dir) == 0
    assert told in capfd.readouterr().err
    assert [line[:4] for line in lines(tmp_path)] == ["-n 3", "-n 5", "-n 2"][: 3 if number == 2 else 2]


def test_the_same_number_again_starts_nothing_anew(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    late = f'{ask(5)} while [ -e "$run/RANKS" ]; do sleep 0.05; done; {NEXT}'
    wait = f"""{BEGIN} trap '{CHECKPOINT} exit {STOPPED}' USR1; {ask(5)} while :; do sleep 0.05; done"""
    assert launched(launcher(wait, late + FINISH), run_dir) == 0
    assert "5 ranks get ready already" in capfd.readouterr().err
    assert len(lines(tmp_path)) == 2


def test_a_loss_while_others_are_not_ready_yet_starts_as_many_as_before(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} {CHECKPOINT} {ask(5)} while [ ! -e "$lines.2" ]; do sleep 0.05; done; {LOSE}"""
    assert launched(launcher(wait, NEVER, FINISH), run_dir, "--restarts", "1") == 0
    told = capfd.readouterr().err
    assert "lost rank 2 on node07; 5 ranks were not ready yet; starts again from epoch-000001 on 3 ranks" in told
    assert lines(tmp_path)[2].startswith("-n 3 ")


@pytest.mark.parametrize("when", ["before the word", "after the word"])
def test_where_ranks_that_were_ready_fail_as_many_as_before_start_again(
    when: str, launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = 'for gate; do :; done; touch "$gate.ready"; '
    last = f"""while [ -e "$lines.2" ]; do sleep 0.05; done; sleep 0.3; {CHECKPOINT} exit {STOPPED}"""
    wait = f"""{BEGIN} touch "$lines.2"; trap '{last}' USR1; {ask(5)} while :; do sleep 0.05; done"""
    # It leaves when the others have been asked to stop, which is when the launch has seen that it is ready.
    dies = ready + 'sleep 1; rm "$lines.2"; exit 9' if when == "before the word" else f"{NEXT} exit 9"
    if when == "after the word":
        wait = wait.replace('touch "$lines.2"; ', "")
    assert launched(launcher(wait, dies, FINISH), run_dir, "--restarts", "0") == 0
    told = capfd.readouterr().err
    assert "5 ranks failed before they began; starts again from epoch-000001 on 3 ranks\n" in told
    assert lines(tmp_path)[2].startswith("-n 3 ")


def test_training_goes_on_where_the_launcher_is_gone(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} rm "$0"; {ask(5)} while [ -e "$run/RANKS" ]; do sleep 0.05; done; sleep 0.3; {FINISH}"""
    assert launched(launcher(wait), run_dir) == 0
    assert "5 ranks cannot be started: " in capfd.readouterr().err


def test_a_signal_while_others_get_ready_ends_them_too(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    process = waiting(launcher(f"trap 'exit {STOPPED}' USR1; {BEGIN} while :; do sleep 0.05; done", NEVER), run_dir)
    (run_dir / "RANKS").write_text("5")
    wait_for(tmp_path / "lines.2")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == STOPPED, told
    assert not Path("/proc", (tmp_path / "lines.2").read_text().strip()).exists(), "ended before its parent has"
    assert not (run_dir / "ends").exists()


def test_ranks_that_fail_when_they_are_let_in_are_not_followed_by_others_that_are_not_ready(
    launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = f"""{BEGIN} trap '{CHECKPOINT} exit {STOPPED}' USR1; {ask(5)} while :; do sleep 0.05; done"""
    second = f"""{NEXT} {ask(8)} while [ ! -e "$lines.2" ]; do sleep 0.05; done; exit 9"""
    assert launched(launcher(first, second, NEVER, FINISH), run_dir) == 0
    assert [line[:4] for line in lines(tmp_path)] == ["-n 3", "-n 5", "-n 8", "-n 3"]
    assert "5 ranks failed before they began; starts again from epoch-000001 on 3 ranks\n" in capfd.readouterr().err


def test_a_second_launch_in_a_run_directory_is_refused_and_changes_nothing(launcher: Launcher, run_dir: Path) -> None:
    process = waiting(launcher(f"trap 'exit {STOPPED}' USR1; {BEGIN} while :; do sleep 0.05; done", FINISH), run_dir)
    try:
        words = [sys.executable, "-m", "mpidl", "launch", "mpidl", "train", "--resume", str(run_dir)]
        second = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (second.returncode, second.stderr.count("another job trains in")) == (4, 1), second
        assert (run_dir / "ends").is_dir()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.toml"]


def ask(ranks: int) -> str:
    return f'echo {ranks} >"$run/RANKS"; '


def words(tmp_path: Path) -> list[str]:
    """What ranks that got ready were told."""
    return (tmp_path / "lines.words").read_text().split()


@pytest.mark.parametrize("text", ["9", "0", "many", "3"])
def test_a_file_ranks_that_cannot_be_followed_changes_nothing(
    text: str, launcher: Launcher, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = f"""{BEGIN} echo {text} >"$run/RANKS"; while [ -e "$run/RANKS" ]; do sleep 0.05; done; {FINISH}"""
    assert launched(launcher(wait), run_dir) == 0
    assert len(lines(tmp_path)) == 1
    assert f"RANKS says {text}" in capfd.readouterr().err.replace("'", "")


@pytest.mark.parametrize(
    ("sent", "trapped", "code"),
    [
        (signal.SIGINT, "USR1", 130),
        (signal.SIGTERM, "USR1", STOPPED),
        (signal.SIGUSR1, "USR1", STOPPED),
        (signal.SIGHUP, "USR1", STOPPED),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGUSR1", "SIGHUP"],
)
def test_a_signal_ends_the_training_and_restarts_nothing(
    sent: signal.Signals, trapped: str, code: int, launcher: Launcher, run_dir: Path, tmp_path: Path
) -> None:
    process = waiting(launcher(f"trap 'exit {code}' {trapped}; {BEGIN} while :; do sleep 0.05; done"), run_dir)
    process.send_signal(sent)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, told
    assert len(lines(tmp_path)) == 1
    assert b"goes on" in told


def test_under_nohup_a_closed_terminal_changes_nothing(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    end = f'{BEGIN} while [ ! -e "{tmp_path}/end" ]; do sleep 0.05; done; {FINISH}'
    process = waiting(launcher(f"trap 'exit 5' USR1; {end}"), run_dir, on_hangup=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    (tmp_path / "end").touch()
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told


def waiting(launcher: str, run_dir: Path, on_hangup: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[bytes]:
    """A process of `mpidl launch` whose training has begun."""
    words = ["launch", "--mpirun", launcher, "mpidl", "train", "--run-dir", str(run_dir)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mpidl", *words],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, on_hangup),  # tests may run under nohup themselves
    )
    wait_for(run_dir / "config.toml")
    return process


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert file.exists()


def test_when_it_is_killed_the_launcher_is_asked_to_end(launcher: Launcher, run_dir: Path, tmp_path: Path) -> None:
    process = waiting(
        launcher(f"trap 'touch {tmp_path}/ended; exit' TERM; {BEGIN} while :; do sleep 0.05; done"), run_dir
    )
    process.kill()
    process.wait()
    wait_for(tmp_path / "ended")
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (End(2, False, True), 2),
        (End(11, False, True, rank_codes=[2, EXIT_LOST]), 2),
        (End(3, False, True), 3),
        (End(STOPPED, False, True), STOPPED),
        (End(130, False, True, asked=signal.SIGINT), 130),
        (End(139, True, True, rank_codes=[EXIT_LOST]), 0),
    ],
    ids=["bad input", "bad input on one rank", "not finite", "stopped", "interrupted", "lost after the end"],
)
def test_no_end_that_a_restart_does_not_mend_is_followed_by_one(end: End, code: int) -> None:
    verdict = judge(end, Count(restarts_left=3))
    assert (verdict.restarts, verdict.code) == (False, code)


@pytest.mark.parametrize(
    "end",
    [End(137, False, True), End(0, False, True), End(-9, False, True), End(4, False, True), End(76, False, True)],
    ids=["lost", "a node lost under Open MPI", "the launcher killed", "no room for a checkpoint", "hung"],
)
def test_ends_that_another_start_may_mend_are_followed_by_one(end: End) -> None:
    assert judge(end, Count(restarts_left=1)).restarts
    left = judge(end, Count(restarts_left=0))
    assert not left.restarts
    assert left.code != 0


def test_progress_is_a_new_checkpoint() -> None:
    count = Count(restarts_left=9)
    for checkpoint in (None, None, "epoch-000001", "epoch-000001", "epoch-000001"):
        count.ended_with(checkpoint)
        assert judge(End(137, False, True), count).restarts
    count.ended_with("epoch-000001")
    assert not judge(End(137, False, True), count).restarts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which is missing"),
        (["python", "train.py"], "mpidl launch starts a training"),
        (["mpidl", "evaluate", "runs/digits"], "mpidl launch starts a training"),
        (["mpirun", "-n", "2", "mpidl", "train"], "mpidl launch starts mpirun itself: .* --mpirun mpirun mpidl train"),
        (["mpidl", "train", "--epochz", "3"], "did you mean --epochs"),
        (["mpidl", "train", "--replay", "runs/digits"], "cannot start a replay again"),
        (["mpidl", "train", "--resume", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        cli.launch(cli.parse(["launch", "-n", "2", "--mpirun", "sh", *words]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-n", "0"], "'0' is not a number of at least 1"),
        (["--restarts", "-1"], "'-1' is not a number of at least 0"),
        (["--mpirun", "no-such-launcher -x"], "there is no such command"),
        (["--mpirun", "'"], "cannot be read"),
        (["--restart", "3"], "did you mean --restarts"),
    ],
)
def test_options_that_are_wrong_are_told(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cli.launch(cli.parse(["launch", *options, "mpidl", "train"]))


def test_it_cannot_be_started_by_the_ranks_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(LaunchError, match="not under mpirun"):
        cli.launch(cli.parse(["launch", "mpidl", "train"]))


def test_a_run_directory_is_made_where_none_was_given(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("epochs = 3\n")
    for number in (1, 2):
        assert (
            cli.main(
                ["launch", "--mpirun", launcher('touch "runs/job/x"; exit 2', "exit 2"), "mpidl", "train", "job.toml"]
            )
            == 2
        )
        name = "job" if number == 1 else "job-2"
        assert lines(tmp_path)[-1] == f"mpidl train job.toml --run-dir runs/{name}"
    assert [path.name for path in Path("runs").iterdir()] == ["job"], "what nothing was written to is gone"


# --- guards -------------------------------------------------------------------------------------------------------


def guarded(code: str, run_dir: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A rank with a guard, and without MPI."""
    script = f"import os, signal, sys, time\nfrom mpidl import guard\nguard.begin()\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script, str(run_dir)],
        env={**os.environ, "PMI_RANK": "2", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        start_new_session=True,
    )


KILLED = "guard.tell(size=4, run_dir=sys.argv[1]); os.kill(os.getpid(), signal.SIGKILL)"


def test_a_guard_names_its_lost_rank_writes_it_down_and_ends_alike(run_dir: Path) -> None:
    (run_dir / "ends").mkdir(parents=True)
    ended = guarded(KILLED, run_dir)
    assert ended.returncode == -signal.SIGKILL
    host = os.uname().nodename
    assert ended.stderr.startswith("mpidl: error: rank 2 of 4 was lost: process ")
    assert f" on {host} was killed by signal 9 (SIGKILL)" in ended.stderr
    assert "goes on" not in ended.stderr, "the run had not begun"
    (run_dir / "config.toml").touch()
    assert f"mpidl train --resume {run_dir} goes on" in guarded(KILLED, run_dir).stderr
    written = json.loads((run_dir / "ends" / "rank-00002.json").read_text())
    assert (written["rank"], written["host"], written["code"]) == (2, host, -9)


def test_a_loss_is_written_for_the_other_nodes_watchdogs_where_there_are_any(run_dir: Path) -> None:
    run_dir.mkdir()
    assert guarded(KILLED, run_dir).returncode == -signal.SIGKILL
    assert not list(run_dir.iterdir())
    assert guarded(f"guard.tell(job='key'); {KILLED}", run_dir).returncode == -signal.SIGKILL
    (written,) = run_dir.rglob("*.json")
    facts = json.loads(written.read_text())
    assert (written.parent.name, facts["job"], facts["rank"], facts["code"]) == ("hang", "key", 2, -9)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(7)", 7),
        ("sys.exit(0)", 0),
        # To the group, as launchers send it: the rank takes note, and its guard with it.
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); os.killpg(0, signal.SIGTERM); time.sleep(9)", 75),
        ("os.killpg(0, signal.SIGUSR1); time.sleep(9)", -signal.SIGUSR1),
        ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(9)", -signal.SIGKILL),
    ],
    ids=["an error code", "success", "a stop", "a signal to both", "the guard killed"],
)
def test_a_guard_ends_like_its_rank_and_is_silent_where_nothing_was_lost(code: str, status: int, run_dir: Path) -> None:
    ended = guarded(code, run_dir)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", "")


def test_there_is_no_guard_where_survivors_go_on_or_nothing_was_launched(run_dir: Path) -> None:
    asked = "print(os.getppid() == int(os.environ['PARENT']))"
    env = {"PARENT": str(os.getpid())}
    assert guarded(asked, run_dir, **env).stdout == "False\n"
    assert guarded(asked, run_dir, **env, OMPI_MCA_mpi_ft_enable="1").stdout == "True\n"
    assert guarded(asked, run_dir, **env, PMI_RANK="").stdout == "True\n"


def test_guards_are_made_before_numpy_and_torch_start_threads() -> None:
    code = "import sys, mpidl.cli; print(sorted({'numpy', 'torch', 'mpi4py'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.stdout == "[]\n"
