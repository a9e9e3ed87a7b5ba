"""Ranks that get ready beside those that train wait for one word, all of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mpidl.runtime import World, signals
from mpidl.standby import GO, LEAVE, Gate, wait


@pytest.fixture
def gate(world: World, tmp_path: Path) -> Gate:
    return Gate(world.broadcast_object(tmp_path) / "ends" / "gate-1")


@pytest.mark.parametrize(("word", "goes_on"), [(GO, True), (LEAVE, False)])
def test_all_ranks_do_what_the_word_says(word: str, goes_on: bool, world: World, gate: Gate) -> None:
    def say() -> None:
        deadline = time.monotonic() + 30.0
        while not gate.is_ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.say(word)

    if world.rank == 0:
        gate.path.parent.mkdir()
        speaker = threading.Thread(target=say, daemon=True)
        speaker.start()
    assert wait(world, gate) == goes_on
    if world.rank == 0:
        speaker.join()


def test_a_word_that_was_said_before_counts(world: World, gate: Gate) -> None:
    if world.rank == 0:
        gate.say(GO)
    assert wait(world, gate)


def test_a_signal_to_the_first_rank_lets_all_leave(world: World, gate: Gate) -> None:
    if world.rank == 0:
        gate.path.parent.mkdir()
    signals.listen()
    try:
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not wait(world, gate)
    finally:
        signals.stop_listening()
