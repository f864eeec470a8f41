"""Reading in threads, ahead of whoever uses what is read."""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def map_ahead(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  number: int,
  threads: concurrent.futures.Executor | None = None,
) -> Iterator[Any]:
  """Like `map`, in threads that are up to `number` items ahead.

  While the last result is in use, `number` others are ready or under way, and
  no more.  Items are taken as they are needed, in order.  Who does this often
  has `threads` of its own: malloc keeps memory for each that there ever was.
  """
  items = iter(items)
  with (
    concurrent.futures.ThreadPoolExecutor()
    if threads is None
    else contextlib.nullcontext(threads)
  ) as pool:
    start = lambda number: [
      pool.submit(function, item) for item in itertools.islice(items, number)
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
