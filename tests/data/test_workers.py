"""Tasks on several processes or threads: every result once, news in the main thread, an early end where one fails."""

import time

import pytest

from geolrm_jax.data.builders.workers import run_tasks


def count(start, stop, done):
    """Sums a range, telling of each number; 13 is refused."""
    for number in range(start, stop):
        if number == 13:
            raise ValueError("13 is not counted")
        time.sleep(0.01)
        done(number)
    return sum(range(start, stop))


@pytest.mark.parametrize("threads", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_task_runs_once_and_tells_what_it_does(threads):
    told, tasks = [], [(i, i + 2) for i in range(0, 12, 2)]
    results = list(run_tasks(count, tasks, workers=2, threads=threads, done=told.append))
    assert sorted(results) == [1, 5, 9, 13, 17, 21] and sorted(told) == list(range(12))


@pytest.mark.parametrize("threads", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_failure_ends_the_others(threads):
    started = time.monotonic()
    with pytest.raises(ValueError, match="13 is not counted"):
        list(run_tasks(count, [(13, 14), (100, 20_000)], workers=2, threads=threads, done=lambda _: None))
    assert time.monotonic() - started < 60
