"""Work for several threads, its results in order."""

import itertools
import threading
import time

import pytest

from meddiff_steps.core.pool import WAITING, in_order


def test_results_come_in_order_whoever_is_first():
    def run(number):
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number * number

    assert list(in_order(run, range(20), 4)) == [n * n for n in range(20)]


def test_threads_work_at_the_same_time():
    barrier = threading.Barrier(3, timeout=10)
    assert list(in_order(lambda number: barrier.wait() is not None, range(3), 3)) == [True] * 3


def test_no_more_is_taken_than_some_ahead():
    taken = itertools.count()
    found = in_order(lambda number: number, (next(taken) for _ in range(1000)), 2)
    assert next(found) == 0
    assert next(taken) <= WAITING * 2 + 1
    found.close()


def test_what_fails_is_raised_in_its_turn():
    found = in_order(lambda number: 1 // number, [2, 1, 0, 1], 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
