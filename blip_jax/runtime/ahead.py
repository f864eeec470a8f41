"""Maps that run ahead of their consumer."""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any


def map_ahead(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  number: int,
  threads: concurrent.futures.Executor | None = None,
) -> Generator[Any, None, None]:
  """Like `map`, in threads that are up to `number` items ahead.

  While a result is in use, at most `number` others are ready or being computed.
  Items are taken when they are needed, in order.  Frequent callers pass their
  own `threads`: malloc keeps memory for every thread that ever existed.
  """
  items = iter(items)
  with (
    concurrent.futures.ThreadPoolExecutor()
    if threads is None
    else contextlib.nullcontext(threads)
  ) as pool:
    start = lambda count: [
      pool.submit(function, item) for item in itertools.islice(items, count)
    ]
    waiting = collections.deque(start(number))
    try:
      while waiting:
        result = waiting.popleft().result()
        waiting.extend(start(1))
        yield result
    finally:
      for future in waiting:
        future.cancel()


def started_ahead(
  start: Callable[[Any], Callable[[], Any]],
  items: Iterable[Any],
  number: int,
) -> Generator[Any, None, None]:
  """Yields what `start(item)()` returns, in order.

  `start` begins something, such as a program on a device, and returns what
  waits for its result. While one result is awaited, `number` others have begun.
  """
  waiting: collections.deque[Callable[[], Any]] = collections.deque()
  for item in items:
    waiting.append(start(item))
    if len(waiting) > number:
      yield waiting.popleft()()
  while waiting:
    yield waiting.popleft()()
