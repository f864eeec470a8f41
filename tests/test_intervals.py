"""When a run saves: at steps, and in time."""

import itertools

import numpy as np
import pytest

from blip_jax.runtime import intervals


class Clock:
  def __init__(self):
    self.now, self.looks = 1000.0, 0

  def __call__(self):
    return self.now


def never():
  raise AssertionError


def due_steps(
  seconds_of, num_steps, busy=(), first_step=0, finish=never, **settings
):
  """The steps at which something is due, and the time of each."""
  clock = Clock()
  interval = intervals.Interval(first_step=first_step, clock=clock, **settings)
  found = {}
  for step in range(first_step + 1, first_step + num_steps + 1):
    clock.now += seconds_of(step)
    if interval.due(step, lambda step=step: step in busy, finish):
      found[step] = clock.now - 1000
  return found


def test_steps_alone():
  found = due_steps(lambda _: 99.0, 35, every_steps=10, every_seconds=0.0)
  assert [*found] == [10, 20, 30]
  settings = dict(every_steps=10, every_seconds=0.0, first_step=17)
  assert [*due_steps(lambda _: 1.0, 20, **settings)] == [20, 30]


@pytest.mark.parametrize("seconds", [0.01, 0.3, 7.0, 200.0])
def test_no_more_time_passes_than_asked_for_and_a_step(seconds):
  """The first step compiles, and takes a minute longer."""
  found = due_steps(
    lambda step: seconds + 60 * (step == 1),
    20_000,
    every_steps=10**9,
    every_seconds=45.0,
  )
  times = [60.0 + seconds, *found.values()]
  gaps = [b - a for a, b in itertools.pairwise(times)]
  assert len(gaps) > 2
  assert max(gaps) <= 45 + seconds + 1e-6
  assert min(gaps) >= 45 - 1e-6


def test_steps_that_become_slower_are_noticed():
  found = due_steps(
    lambda step: 0.1 if step < 400 else 2.0,
    1000,
    every_steps=10**9,
    every_seconds=45.0,
  )
  times = [*found.values()]
  gaps = [b - a for a, b in itertools.pairwise(times)]
  assert max(gaps) < 100 and max(gaps[2:]) <= 47.01


def test_what_is_being_written_is_waited_for():
  found = due_steps(
    lambda _: 1.0, 100, busy=range(45, 61), every_steps=99, every_seconds=45.0
  )
  assert [*found] == [61, 99]


def test_a_step_that_compiles_for_minutes_is_not_saved_for_that():
  found = due_steps(
    lambda step: 300.0 if step == 1 else 1.0,
    50,
    every_steps=99,
    every_seconds=45.0,
  )
  assert [*found] == [46]


def test_all_processes_follow_the_clock_of_the_first(monkeypatch):
  """It looks at it seldom, and steps at multiples need no answer."""
  told, finished = [], []

  def of_first(number):
    told.append(number)
    assert len(told) == len(finished)
    return np.int32(7 if len(told) == 1 else 0)

  utils = intervals.multihost_utils
  monkeypatch.setattr(utils, "broadcast_one_to_all", of_first)
  monkeypatch.setattr(intervals.jax, "process_count", lambda: 2)
  settings = dict(every_steps=20, every_seconds=45.0)
  settings["finish"] = lambda: finished.append(1)
  found = due_steps(lambda _: 0.001, 9, **settings)
  assert [*found] == [9] and len(told) == 2
