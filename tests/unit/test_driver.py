"""Courses side by side, with and without a thread: their order, what waits for what, and where exceptions go."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from mpidl.parameters.driver import Awaited, Course, Driver, Flag, ThreadDriver
from mpidl.parameters.errands import MAX_UNDER_WAY, Errand, two_stage

Either = Driver | ThreadDriver
LIMIT_S = 30.0


@pytest.fixture(params=[Driver, ThreadDriver])
def driver(request: pytest.FixtureRequest) -> Iterator[Either]:
    made: Either = request.param()
    yield made
    made.close()


def flag_within_limit() -> Flag:
    """A flag that is raised in the end in any case, so that who waits for it in vain fails instead of hanging."""
    flag = Flag()
    timer = threading.Timer(LIMIT_S, flag.raise_flag)
    timer.daemon = True
    timer.start()
    return flag


class Once:
    """Over as soon as a condition holds."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over


def telling(log: list[str], name: str, waits_for: Sequence[Awaited], done: Flag | None = None) -> Course:
    for number, flag in enumerate(waits_for):
        yield flag
        log.append(f"{name}{number}")
    if done is not None:
        done.raise_flag()


def test_a_course_goes_on_from_flag_to_flag_and_never_past_one_that_is_down(driver: Either) -> None:
    log: list[str] = []
    flags, done = [Flag() for _ in range(3)], Flag()
    flags[0].raise_flag()
    flags[2].raise_flag()
    here = Flag()
    driver.add(telling(log, "a", flags, done))
    driver.add(telling([], "b", [flags[0]], here))
    driver.wait(here)
    assert log == ["a0"]
    assert not done.is_over()
    driver.say(flags[1])
    driver.wait(done)
    assert log == ["a0", "a1", "a2"]


def test_courses_begin_in_the_order_in_which_they_are_added(driver: Either) -> None:
    log: list[str] = []
    over, done = Flag(), Flag()
    over.raise_flag()
    names = "abcdefgh"
    driver.add(*(telling(log, name, [over]) for name in names))
    driver.add(telling(log, "last", [over], done))
    driver.wait(done)
    assert log == [*(f"{name}0" for name in names), "last0"]


def test_what_becomes_possible_at_the_same_time_is_done_in_the_order_of_adding(driver: Either) -> None:
    log: list[str] = []
    gate, done = Flag(), Flag()
    driver.add(*(telling(log, name, [gate]) for name in "abcde"))
    driver.say(gate)
    driver.add(telling([], "end", [gate, Once(lambda: len(log) == 5)], done))
    driver.wait(done)
    # The gate may have gone up in the middle of one round; who was asked before comes in the next.
    turn = log.index("a0")
    assert log[turn:] + log[:turn] == ["a0", "b0", "c0", "d0", "e0"]


def test_courses_wait_for_each_other(driver: Either) -> None:
    log: list[str] = []
    ping, pong = [Flag() for _ in range(50)], [Flag() for _ in range(50)]

    def play(name: str, own: list[Flag], other: list[Flag]) -> Course:
        for mine, theirs in zip(own, other, strict=True):
            yield mine
            log.append(name)
            theirs.raise_flag()

    driver.add(play("ping", ping, pong), play("pong", pong, [*ping[1:], Flag()]))
    driver.say(ping[0])
    done = Flag()
    driver.add(telling([], "end", [pong[-1]], done))
    driver.wait(done)
    assert log[:99] == ["ping", "pong"] * 49 + ["ping"]


class Broken(BaseException):
    """Not even an Exception."""


def breaking(waits_for: Flag) -> Course:
    yield waits_for
    raise Broken("the course is broken")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it ends a job
def test_an_exception_reaches_the_waiter_and_every_later_call(driver: Either) -> None:
    driver.add(telling([], "never", [Flag()]))
    calls: list[Callable[[], None]] = [
        lambda: driver.add(breaking(gate)),
        lambda: driver.wait(flag_within_limit()),
    ]
    gate = Flag()
    driver.add(breaking(gate))
    driver.say(gate)
    with pytest.raises(Broken):
        driver.wait(flag_within_limit())
    for call in calls:
        with pytest.raises(Broken):
            call()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it ends a job
def test_an_exception_comes_at_the_next_call_where_nobody_waited() -> None:
    driver, over = ThreadDriver(), Flag()
    over.raise_flag()
    driver.add(breaking(over))
    driver._thread.join(LIMIT_S)
    assert not driver._thread.is_alive()
    for call in (functools.partial(driver.add, telling([], "a", [over])), functools.partial(driver.wait, over)):
        with pytest.raises(Broken):
            call()
    driver.close()


def test_with_a_thread_courses_go_on_while_nobody_waits_and_without_one_they_do_not() -> None:
    for kind, expected in ((ThreadDriver, True), (Driver, False)):
        driver: Either = kind()
        gate, done = Flag(), Flag()
        driver.add(telling([], "a", [gate], done))
        driver.say(gate)
        assert done.wait(LIMIT_S if expected else 0.1) == expected
        driver.wait(done)
        driver.close()


def test_the_thread_takes_courses_while_others_are_under_way_and_after_all_have_ended() -> None:
    driver = ThreadDriver()
    gate = Flag()
    log: list[str] = []
    driver.add(telling(log, "slow", [gate]))
    for name in "abc":
        over, done = Flag(), Flag()
        over.raise_flag()
        driver.add(telling(log, name, [over], done))
        driver.wait(done)
    assert log == ["a0", "b0", "c0"]
    driver.say(gate)
    driver.close()
    again = ThreadDriver()
    for _ in range(3):
        done = Flag()
        again.add(telling([], "alone", [over], done))
        again.wait(done)  # the thread has gone to sleep in between
    again.close()


def test_close_ends_the_thread() -> None:
    driver = ThreadDriver()
    thread = driver._thread
    assert thread.is_alive()
    assert thread.daemon  # a job that forgets to close ends all the same
    driver.close()
    assert not thread.is_alive()


# --- two stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_buckets_start_and_end_in_order_and_few_are_under_way(driver: Either, seed: int) -> None:
    errands: Any = [(index, None) for index in range(12)]  # `start` here makes their exchanges
    ready, over = [Flag() for _ in errands], [Flag() for _ in errands]
    log: list[tuple[str, int]] = []
    done = Flag()

    def exchange(index: int) -> Any:
        yield over[index]
        log.append(("rest", index))

    def start(errand: Errand) -> Any:
        yield ready[errand[0]]
        log.append(("start", errand[0]))
        return exchange(errand[0])

    def end(errand: Errand, steps: Any) -> Course:
        log.append(("end", errand[0]))
        yield from steps

    driver.add(*two_stage(errands, start, end, done))
    flags = [*ready, *over]
    random.Random(seed).shuffle(flags)
    for flag in flags:
        driver.say(flag)
        if isinstance(driver, Driver):
            driver.poll()
    driver.wait(done)
    for stage in ("start", "end", "rest"):
        assert [index for name, index in log if name == stage] == list(range(12))
    under_way = 0
    for name, index in log:
        under_way += {"start": 1, "end": 0, "rest": -1}[name]
        assert under_way <= MAX_UNDER_WAY
        assert name == "start" or ("start", index) in log[: log.index(("end", index))]
        assert name != "rest" or ("end", index) in log[: log.index(("rest", index))]


def test_without_an_end_no_more_than_a_few_are_started() -> None:
    driver, started = Driver(), []
    over = Flag()
    over.raise_flag()
    errands: Any = [(index, None) for index in range(12)]  # `start` here makes their exchanges

    def start(errand: Errand) -> Any:
        yield over
        started.append(errand[0])
        return iter([Flag()])

    driver.add(*two_stage(errands, start, telling, Flag()))  # type: ignore[arg-type]
    while driver.poll():
        pass
    assert started == list(range(MAX_UNDER_WAY))
