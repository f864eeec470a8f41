"""Rows that wait, and the batches that they become."""

import asyncio
import dataclasses
import threading

import pytest

from blip_jax.serve import batcher as batcher_lib


@dataclasses.dataclass(frozen=True)
class Doubled:
  """Doubles numbers; notes the batches, and fails for -1."""

  batches: list = dataclasses.field(default_factory=list, compare=False)
  option: str = ""
  most: int = 4
  gate: threading.Event | None = None
  name = "doubled"

  def __call__(self, rows):
    if self.gate is not None:
      assert self.gate.wait(5)
    self.batches.append([*rows])
    if -1 in rows:
      raise RuntimeError("minus one")
    return [2 * row for row in rows]


def run(test, room=100, patience=0.01):
  """Runs a test with a batcher; returns what it observed."""
  observed = []

  async def with_batcher():
    made = batcher_lib.Batcher(
      room, patience, lambda *batch: observed.append(batch[:2])
    )
    task = asyncio.create_task(made.run())
    try:
      async with asyncio.timeout(10):
        await test(made)
    finally:
      task.cancel()

  asyncio.run(with_batcher())
  return observed


def test_rows_share_batches_with_equal_programs_only():
  one, two = Doubled(), Doubled(option="other")

  async def test(made):
    rows = [one, two, one, one, two, one, one]
    found = made.submit([(program, n) for n, program in enumerate(rows)])
    assert await asyncio.gather(*found) == [2 * n for n in range(7)]

  assert run(test) == [("doubled", 4), ("doubled", 2), ("doubled", 1)]
  # The longest waiting row first; the largest batch has four.
  assert one.batches == [[0, 2, 3, 5], [6]] and two.batches == [[1, 4]]


def test_a_row_waits_for_others_while_the_device_is_idle():
  program = Doubled()

  async def test(made):
    first = made.submit([(program, 1)])
    await asyncio.sleep(0.05)
    second = made.submit([(program, 2)])
    await asyncio.gather(*first, *second)

  run(test, patience=0.5)
  assert program.batches == [[1, 2]]


def test_a_full_queue_takes_all_rows_of_a_request_or_none():
  program = Doubled(gate=threading.Event())

  async def test(made):
    found = made.submit([(program, 1)] * 4)
    await asyncio.sleep(0.05)
    assert made.rows == 4  # under computation
    found += made.submit([(program, 2)])
    with pytest.raises(batcher_lib.Full, match="5 rows"):
      made.submit([(program, 3)] * 2)
    found += made.submit([(program, 4)])
    program.gate.set()
    assert await asyncio.gather(*found) == [2, 2, 2, 2, 4, 8]
    await asyncio.sleep(0)
    assert made.rows == 0

  run(test, room=6)


def test_a_row_that_is_given_up_leaves_its_place():
  program = Doubled(gate=threading.Event(), most=1)

  async def test(made):
    running, waiting, last = made.submit([(program, n) for n in (1, 2, 3)])
    await asyncio.sleep(0.05)
    waiting.cancel()
    running.cancel()  # too late to save work, but nobody is harmed
    await asyncio.sleep(0)
    assert made.rows == 2
    program.gate.set()
    assert await last == 6

  run(test)
  assert program.batches == [[1], [3]]


def test_a_row_that_fails_costs_the_others_nothing():
  program = Doubled()

  async def test(made):
    found = made.submit([(program, n) for n in (1, -1, 3)])
    found = await asyncio.gather(*found, return_exceptions=True)
    assert found[0] == 2 and found[2] == 6
    assert str(found[1]) == "minus one"

  run(test)
