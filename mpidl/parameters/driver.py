"""Running several exchanges side by side, each written as a generator that yields what it waits for.

With a thread, the exchanges go on while the main thread computes; without one (where MPI was not granted
MPI_THREAD_MULTIPLE), they go on while the main thread waits for them. The thread makes MPI calls on communicators of
its own only. It never blocks inside MPI, and never yields: it looks at what each exchange waits for and sleeps when
nothing has moved, longer each time; until somebody speaks, where all of them wait for the main thread. (A thread that
yields has to wait behind one that computes: under Linux 6.18 it got the core every 15 to 60 ms only, where one that
had slept got it within 5.)

A generator's exception ends the driver; it is raised by every later call of the main thread's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Protocol

from mpidl.runtime import Patience, Pending


class Awaited(Protocol):
    """What a generator waits for."""

    def is_over(self) -> bool:
        """Whether it may go on; may be asked again and again."""
        ...


Course = Generator[Awaited, None, None]


class Flag:
    """Something that one thread says to another, once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.raise_flag = self._event.set
        self.is_over = self._event.is_set
        self.wait = self._event.wait


class Condition:
    """Over as soon as a function of the courses' own state says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over


class Driver:
    """Advances courses in the thread that calls `poll` or `wait`."""

    def __init__(self) -> None:
        self._active: list[tuple[Course, Awaited]] = []
        self._failure: BaseException | None = None

    def add(self, *courses: Course) -> None:
        """Begin courses; they are advanced in the order in which they were added."""
        self._check()
        for course in courses:
            self._advance(course)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _advance(self, course: Course) -> None:
        """Go on as far as it gets; keep the course if it waits."""
        try:
            for awaited in course:
                if not awaited.is_over():
                    self._active.append((course, awaited))
                    return
        except BaseException as error:
            self._failure = error
            raise

    def poll(self) -> bool:
        """Look at every course once; returns whether any moved."""
        self._check()
        active, self._active = self._active, []
        moved = False
        for course, awaited in active:
            if awaited.is_over():
                moved = True
                self._advance(course)
            else:
                self._active.append((course, awaited))
        return moved

    @property
    def waits_for_flags(self) -> bool:
        """Whether nothing goes on before a flag is raised: no message is under way."""
        return all(isinstance(awaited, Flag | Condition) for _, awaited in self._active)

    def is_waited_for(self) -> bool:
        """Whether the main thread does nothing else while courses are advanced: it does so itself."""
        return True

    def say(self, flag: Flag) -> None:
        """Raise a flag that courses wait for."""
        flag.raise_flag()

    def wait(self, flag: Flag) -> None:
        """Advance courses until the flag is raised."""
        self._advance_until(flag)

    def complete(self, pending: Pending) -> None:
        """Wait for what the main thread itself has begun; others may come to it by help of the courses only."""
        self._advance_until(pending)

    def _advance_until(self, awaited: Awaited) -> None:
        patience = Patience()
        while not awaited.is_over():
            if self.poll():
                patience.reset()
            else:
                patience.pause()

    def close(self) -> None:
        """Let nothing more be added. All courses have ended."""


FIRST_SLEEP_S, LONGEST_SLEEP_S = 2e-4, 1e-3
"""A message's next part waits as long for the thread: the first where the main thread waits too, else up to the last.
Shorter sleeps took more of the core than they gave."""


class ThreadDriver:
    """Advances courses in a thread of its own."""

    def __init__(self) -> None:
        self._added: queue.SimpleQueue[tuple[Course, ...] | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._failure: BaseException | None = None
        self._waited_for: Flag | None = None
        self._thread = threading.Thread(target=self._run, name="mpidl-exchange", daemon=True)
        self._thread.start()

    def add(self, *courses: Course) -> None:
        """Begin courses; they are advanced in the order in which they were added."""
        self._check()
        self._added.put(courses)
        self._wake.set()

    def is_waited_for(self) -> bool:
        """Whether the main thread waits in `wait`."""
        return self._waited_for is not None

    def say(self, flag: Flag) -> None:
        """Raise a flag that courses wait for."""
        flag.raise_flag()
        self._wake.set()

    def wait(self, flag: Flag) -> None:
        """Sleep until the flag is raised."""
        self._waited_for = flag
        self._check()
        flag.wait()
        self._waited_for = None
        self._check()

    def complete(self, pending: Pending) -> None:
        """Wait for what the main thread itself has begun."""
        pending.wait()

    def close(self) -> None:
        """End the thread, when all courses have ended."""
        self._added.put(None)
        self._wake.set()
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._drive()
        except BaseException as error:
            self._failure = error
            if self._waited_for is None:
                raise  # nobody would be told: the hook for uncaught exceptions of threads ends the job
            self._waited_for.raise_flag()

    def _drive(self) -> None:
        driver, patience = Driver(), Patience(yields=0, first_s=FIRST_SLEEP_S, longest_s=LONGEST_SLEEP_S)
        while True:
            if self._take_added(driver):
                return
            if driver.poll():
                patience.reset()
            elif not driver.waits_for_flags:
                if self._waited_for is not None:
                    patience.reset()
                patience.pause()
            elif self._wake.is_set():  # something was said, or added, since the last time
                self._wake.clear()
            else:
                self._wake.wait()

    def _take_added(self, driver: Driver) -> bool:
        """Begin what was added; returns whether that was the end."""
        while not self._added.empty():
            courses = self._added.get()
            if courses is None:
                return True
            driver.add(*courses)
        return False
