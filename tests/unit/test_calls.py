"""Counting calls: every tally is in the total, also while other threads count."""

from __future__ import annotations

import threading

from mpidl.runtime.calls import Calls


def test_tallies_apart_are_in_everyone_s_total() -> None:
    first = Calls()
    second = first.apart()
    third = second.apart()
    first.own["Ibcast", "plan"] += 2
    second.own["Ibcast", "plan"] += 1
    third.own["Igather", "report"] += 4
    for each in (first, second, third):
        assert each.total() == {("Ibcast", "plan"): 3, ("Igather", "report"): 4}
        assert (each.number_of("plan"), each.number_of("report"), each.number_of("other")) == (3, 4, 0)
    assert first.own == {("Ibcast", "plan"): 2}


def test_a_total_is_not_a_tally() -> None:
    calls = Calls()
    calls.total()["Ibcast", "plan"] += 1
    assert calls.total() == {}


def test_no_call_of_any_thread_is_lost_while_totals_are_taken() -> None:
    calls, number = Calls(), 20_000

    def count(own: Calls) -> None:
        for index in range(number):
            own.own["Ibarrier", f"purpose {index % 50}"] += 1  # keys come while the total is read

    threads = [threading.Thread(target=count, args=(calls.apart(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = 0
    while any(thread.is_alive() for thread in threads):
        total = calls.total().total()
        assert total >= before
        before = total
    for thread in threads:
        thread.join()
    assert calls.total().total() == 3 * number
